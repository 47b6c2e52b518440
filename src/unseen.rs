//! Characters that a reader cannot see, or that change what others look like. Texts of apps and destinations are
//! shown with these written out.
//!
//! Not here: how the page shows them (`owner`).

use std::fmt;

/// Whether a character shows nothing, or changes where others are shown.
pub fn is_unseen(character: char) -> bool {
    character.is_control()
        || matches!(character,
            '\u{ad}' | '\u{34f}' | '\u{61c}' | '\u{115f}' | '\u{1160}' | '\u{17b4}' | '\u{17b5}'
            | '\u{180b}'..='\u{180f}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{2800}' | '\u{3164}' | '\u{fe00}'..='\u{fe0f}' | '\u{feff}'
            | '\u{ffa0}' | '\u{fff0}'..='\u{fffb}' | '\u{1d173}'..='\u{1d17a}'
            | '\u{e000}'..='\u{f8ff}' | '\u{e0000}'..='\u{10ffff}')
}

/// The longest text from outside that is shown, in characters.
const LONGEST: usize = 200;

/// Text that an app or a destination has chosen, for a terminal or a message: control characters and those that
/// change the direction of others or take no room are written as `\u{…}`, and a long text is cut.
pub struct Shown<'a>(pub &'a str);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for character in self.0.chars().take(LONGEST) {
            write_visibly(f, character)?;
        }
        match self.0.chars().count() {
            0..=LONGEST => Ok(()),
            length => write!(f, "… ({length} characters)"),
        }
    }
}

/// The whole of a text that holds some from outside, in the same way.
pub fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        // A string takes any text.
        let _ = write_visibly(&mut escaped, character);
    }
    escaped
}

fn write_visibly(to: &mut impl fmt::Write, character: char) -> fmt::Result {
    match is_unseen(character) {
        true => write!(to, "{}", character.escape_unicode()),
        false => to.write_char(character),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_of_any_script_are_seen_and_what_turns_them_is_not() {
        assert!("aé😀漢ש #…".chars().all(|character| !is_unseen(character)));
        for character in [
            '\0',
            '\u{1b}',
            '\u{ad}',
            '\u{200b}',
            '\u{202e}',
            '\u{2066}',
            '\u{feff}',
            '\u{e0041}',
        ] {
            assert!(is_unseen(character), "{}", character.escape_unicode());
        }
    }

    #[test]
    fn text_from_outside_cannot_change_what_a_terminal_shows() {
        let shown = |text: &str| Shown(text).to_string();
        assert_eq!(shown("hooks.example.com #3f9a"), "hooks.example.com #3f9a");
        assert_eq!(shown("a\u{1b}[2J\r\nb"), "a\\u{1b}[2J\\u{d}\\u{a}b");
        assert_eq!(shown("\u{202e}gpj"), "\\u{202e}gpj");
        assert_eq!(shown("å😀"), "å😀");
        let long = shown(&"x".repeat(1_000_000));
        assert!(long.ends_with("x… (1000000 characters)") && long.len() < 300);
    }
}
