//! How values become text of the page. Everything that is not the page's own goes through here, since
//! identifiers, destinations and messages are whatever an app or a destination made of them.
//!
//! Not here: what is shown (`sections`).

use std::fmt::{self, Display, Formatter, Write};

use time::OffsetDateTime;

use crate::unseen::is_unseen;

/// The characters of a text that are shown.
const LONGEST: usize = 200;
/// The characters of a sentence of the service that are shown: it may contain a few such texts.
const LONGEST_SENTENCE: usize = 1000;

/// Writes to a `String`, which cannot fail.
macro_rules! put {
    ($out:expr, $($arguments:tt)*) => {{
        use std::fmt::Write as _;
        let _ = write!($out, $($arguments)*);
    }};
}
pub(super) use put;

/// A text from outside as HTML: escaped, characters that cannot be seen or that change the order of others as
/// `\u{…}`, cut where it is long, and isolated so that text from right to left does not turn what follows.
pub struct Shown<'a>(pub &'a str);

impl Display for Shown<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str("<bdi>")?;
        visible(f, self.0, LONGEST)?;
        f.write_str("</bdi>")
    }
}

/// The same for the value of an attribute, without the isolation.
pub struct Attribute<'a>(pub &'a str);

impl Display for Attribute<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        visible(f, self.0, LONGEST)
    }
}

/// A sentence of the service's own, in which there are texts from outside.
pub struct Sentence<'a>(pub &'a str);

impl Display for Sentence<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        visible(f, self.0, LONGEST_SENTENCE)
    }
}

/// What stands in HTML for a character that would mean something there.
fn entity(character: char) -> Option<&'static str> {
    Some(match character {
        '&' => "&amp;",
        '<' => "&lt;",
        '>' => "&gt;",
        '"' => "&quot;",
        '\'' => "&#39;",
        _ => return None,
    })
}

fn visible(f: &mut Formatter<'_>, text: &str, longest: usize) -> fmt::Result {
    for (at, character) in text.chars().enumerate() {
        if at == longest {
            return write!(f, "… ({} characters)", Number(text.chars().count() as u64));
        }
        match entity(character) {
            Some(entity) => f.write_str(entity)?,
            None if is_unseen(character) => write!(f, "\\u{{{:x}}}", character as u32)?,
            None => f.write_char(character)?,
        }
    }
    Ok(())
}

/// A value as JSON within an attribute, in ASCII. It is whole, since programs read it.
pub struct Json<'a>(pub &'a serde_json::Value);

impl Display for Json<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        for character in self.0.to_string().chars() {
            match entity(character) {
                Some(entity) => f.write_str(entity)?,
                None if matches!(character, ' '..='~') => f.write_char(character)?,
                None => {
                    for unit in character.encode_utf16(&mut [0; 2]) {
                        write!(f, "\\u{unit:04x}")?;
                    }
                }
            }
        }
        Ok(())
    }
}

/// A text as one component of a URL's query.
pub struct Component<'a>(pub &'a str);

impl Display for Component<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        for byte in self.0.bytes() {
            match byte {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                    f.write_char(byte.into())?;
                }
                _ => write!(f, "%{byte:02X}")?,
            }
        }
        Ok(())
    }
}

/// A number with its thousands apart.
pub struct Number(pub u64);

impl Display for Number {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let digits = self.0.to_string();
        for (at, digit) in digits.chars().enumerate() {
            if at > 0 && (digits.len() - at).is_multiple_of(3) {
                f.write_char(',')?;
            }
            f.write_char(digit)?;
        }
        Ok(())
    }
}

/// A number of bytes, in decimal units.
pub struct Bytes(pub u64);

impl Display for Bytes {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let (mut value, mut unit) = (self.0 as f64, "B");
        for larger in ["kB", "MB", "GB", "TB"] {
            if value < 999.5 {
                break;
            }
            (value, unit) = (value / 1000.0, larger);
        }
        if unit == "B" || value >= 9.95 {
            write!(f, "{value:.0} {unit}")
        } else {
            write!(f, "{value:.1} {unit}")
        }
    }
}

/// A span of seconds, in its largest unit.
pub struct Span(pub f64);

impl Display for Span {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let seconds = self.0.max(0.0).round() as u64;
        match seconds {
            0..120 => write!(f, "{seconds} s"),
            120..7200 => write!(f, "{} min", seconds / 60),
            7200..172_800 => write!(f, "{} h", seconds / 3600),
            _ => write!(f, "{} days", Number(seconds / 86_400)),
        }
    }
}

/// A time as an element, which the page's script turns into the reader's own time.
pub struct Time(pub i64);

impl Display for Time {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Some(time) = moment(self.0) else {
            return f.write_str("an unknown time");
        };
        let (date, hour, minute, second) = (time.date(), time.hour(), time.minute(), time.second());
        write!(
            f,
            "<time datetime=\"{date}T{hour:02}:{minute:02}:{second:02}Z\">{date} {hour:02}:{minute:02} UTC</time>"
        )
    }
}

/// A day, UTC, as an element.
pub struct Day(pub i64);

impl Display for Day {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match moment(self.0) {
            Some(_) => write!(f, "<time datetime=\"{0}\">{0}</time>", Date(self.0)),
            None => f.write_str("an unknown day"),
        }
    }
}

/// A date, UTC.
pub struct Date(pub i64);

impl Display for Date {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match moment(self.0) {
            Some(time) => write!(f, "{}", time.date()),
            None => f.write_str("an unknown day"),
        }
    }
}

/// Unix milliseconds as a time of the calendar. None if it is out of any calendar.
pub fn moment(at: i64) -> Option<OffsetDateTime> {
    let time = OffsetDateTime::from_unix_timestamp(at.div_euclid(1000)).ok()?;
    (0..=9999).contains(&time.year()).then_some(time)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markup_is_escaped_and_unseen_characters_are_shown() {
        let shown = |text| Attribute(text).to_string();
        assert_eq!(shown("<b a='1'>&\""), "&lt;b a=&#39;1&#39;&gt;&amp;&quot;");
        assert_eq!(
            shown("a\u{202e}b\u{0}c\u{200d}d\n"),
            "a\\u{202e}b\\u{0}c\\u{200d}d\\u{a}"
        );
        assert_eq!(Shown("שלום").to_string(), "<bdi>שלום</bdi>");
    }

    #[test]
    fn a_long_text_is_cut_and_its_length_told() {
        let text = Attribute(&"é".repeat(1_048_576)).to_string();
        assert_eq!(text, format!("{}… (1,048,576 characters)", "é".repeat(200)));
        assert_eq!(Attribute(&"x".repeat(200)).to_string(), "x".repeat(200));
    }

    #[test]
    fn json_in_an_attribute_is_whole_and_ascii() {
        let value = serde_json::json!({"who": "a\"'<\u{202e}😀"});
        assert_eq!(
            Json(&value).to_string(),
            "{&quot;who&quot;:&quot;a\\&quot;&#39;&lt;\\u202e\\ud83d\\ude00&quot;}"
        );
    }

    #[test]
    fn numbers_have_units_that_people_read() {
        let bytes = [0, 999, 1000, 9_949, 9_950, 999_499, 999_500, 5_000_000_000]
            .map(|n| Bytes(n).to_string());
        assert_eq!(
            bytes,
            [
                "0 B", "999 B", "1.0 kB", "9.9 kB", "10 kB", "999 kB", "1.0 MB", "5.0 GB"
            ]
        );
        assert_eq!(Number(1_234_567).to_string(), "1,234,567");
        assert_eq!(Number(12).to_string(), "12");
        let spans = [0.4, 119.0, 120.0, 7199.0, 7200.0, 200_000.0].map(|n| Span(n).to_string());
        assert_eq!(spans, ["0 s", "119 s", "2 min", "119 min", "2 h", "2 days"]);
    }

    #[test]
    fn times_out_of_the_calendar_are_said_to_be_unknown() {
        assert_eq!(
            Time(1_795_686_000_000).to_string(),
            "<time datetime=\"2026-11-26T09:40:00Z\">2026-11-26 09:40 UTC</time>"
        );
        assert_eq!(Time(i64::MAX).to_string(), "an unknown time");
        assert_eq!(Date(-1).to_string(), "1969-12-31");
    }
}
