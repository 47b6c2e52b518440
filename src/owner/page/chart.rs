//! The bars of what left: one for each hour, day or week, with the five largest destinations and the others
//! on top of each other, and the same as a table.

use super::View;
use super::query::Range;
use super::text::{Bytes, Date, Day, Number, Shown, Time, put};

/// The destinations with a colour of their own.
const LARGEST: usize = 5;
/// The height of the tallest bar, and the distance of two bars, in the picture's own units.
const HEIGHT: f64 = 120.0;
const STEP: i64 = 20;

/// What the bars show.
struct Bars<'a> {
    /// The largest destinations, the largest first.
    largest: Vec<(&'a str, u64)>,
    /// The bytes of all others together.
    others: u64,
    bars: Vec<Bar>,
}

#[derive(Clone, Default)]
struct Bar {
    /// The bytes of each of the largest, then of the others.
    bytes: [u64; LARGEST + 1],
    delivered: u64,
    failed: u64,
}

impl Bar {
    fn total(&self) -> u64 {
        self.bytes.iter().sum()
    }
}

impl<'a> Bars<'a> {
    fn new(view: &'a View<'_>) -> Self {
        let mut by_destination = std::collections::HashMap::<&str, u64>::new();
        for part in view.parts {
            *by_destination.entry(&part.destination).or_default() += part.amount.bytes_out;
        }
        let mut largest: Vec<_> = by_destination.into_iter().collect();
        largest.sort_unstable_by(|(a, x), (b, y)| y.cmp(x).then(a.cmp(b)));
        let others = largest.iter().skip(LARGEST).map(|(_, bytes)| bytes).sum();
        largest.truncate(LARGEST);

        let (count, span) = view.query.range.bars();
        let start = view.query.range.start(view.status.now);
        let mut bars = vec![Bar::default(); usize::try_from(count).unwrap_or(0)];
        for part in view.parts {
            let index = usize::try_from(part.at.saturating_sub(start).div_euclid(span));
            let Some(bar) = index.ok().and_then(|index| bars.get_mut(index)) else {
                continue;
            };
            let of = |&(name, _): &(&str, u64)| name == part.destination;
            let series = largest.iter().position(of).unwrap_or(LARGEST);
            bar.bytes[series] += part.amount.bytes_out;
            bar.delivered += part.amount.delivered;
            bar.failed += part.amount.failed;
        }
        Self {
            largest,
            others,
            bars,
        }
    }
}

/// The section of the bars.
pub fn section(out: &mut String, view: &View<'_>) {
    let range = view.query.range;
    put!(
        out,
        "<section id=\"bars\" aria-labelledby=\"bars-h\"><div class=\"row\"><h2 id=\"bars-h\">Bytes that left</h2>\
         <nav aria-label=\"Span of the bars\">"
    );
    for (choice, words) in [
        (Range::Day, "24 hours"),
        (Range::Month, "30 days"),
        (Range::Year, "1 year"),
    ] {
        let current = if choice == range {
            " aria-current=\"true\""
        } else {
            ""
        };
        let link = view.query.link(choice, None, "bars");
        put!(out, "<a href=\"{link}\"{current}>{words}</a> ");
    }
    put!(out, "</nav></div>");

    let bars = Bars::new(view);
    let most = bars.bars.iter().map(Bar::total).max().unwrap_or(0);
    if most == 0 {
        put!(
            out,
            "<p class=\"quiet\">Nothing left in this time.</p></section>"
        );
        return;
    }
    picture(out, view, &bars, most);
    table(out, view, &bars);
    put!(out, "</section>");
}

fn picture(out: &mut String, view: &View<'_>, bars: &Bars<'_>, most: u64) {
    let start = view.query.range.start(view.status.now);
    let (count, span) = view.query.range.bars();
    let total: u64 = bars.bars.iter().map(Bar::total).sum();
    put!(
        out,
        "<figure><p class=\"axis\">{}</p><svg viewBox=\"0 0 {} {HEIGHT}\" preserveAspectRatio=\"none\" role=\"img\" \
         aria-label=\"{} bars, {} in all, {} in the tallest. The table below has the numbers.\">",
        Bytes(most),
        count * STEP,
        count,
        Bytes(total),
        Bytes(most)
    );
    // One path for each destination: much shorter than a rectangle for each of its bars.
    let mut paths = vec![String::new(); LARGEST + 1];
    for (bar, x) in bars.bars.iter().zip((2..).step_by(STEP as usize)) {
        let mut top = HEIGHT;
        for (bytes, path) in bar.bytes.iter().zip(&mut paths) {
            // What is there is seen, however little it is beside the tallest.
            let height = match *bytes {
                0 => continue,
                bytes => (bytes as f64 / most as f64 * HEIGHT).max(0.8),
            };
            put!(path, "M{x} {top:.1}h16v-{height:.1}h-16z");
            top -= height;
        }
    }
    for (series, path) in paths.iter().enumerate() {
        if !path.is_empty() {
            put!(out, "<path class=\"c{series}\" d=\"{path}\"/>");
        }
    }
    for (bar, index) in bars.bars.iter().zip(0..) {
        if bar.total() == 0 {
            continue;
        }
        put!(
            out,
            "<rect class=\"hit\" x=\"{}\" width=\"{STEP}\" height=\"{HEIGHT}\"><title>{}: {} in {} exports",
            index * STEP,
            When(view.query.range, start + index * span),
            Bytes(bar.total()),
            Number(bar.delivered)
        );
        if bar.failed > 0 {
            put!(out, ", {} failed", Number(bar.failed));
        }
        put!(out, "</title></rect>");
    }
    put!(
        out,
        "</svg><p class=\"axis row\"><span>{}</span><span>now</span></p><figcaption><ul class=\"legend\">",
        match view.query.range {
            Range::Day => Time(start).to_string(),
            Range::Month | Range::Year => Day(start).to_string(),
        }
    );
    for (series, (name, bytes)) in bars.largest.iter().enumerate() {
        put!(
            out,
            "<li><i class=\"c{series}\"></i>{} <span class=\"quiet\">{}</span></li>",
            Shown(name),
            Bytes(*bytes)
        );
    }
    if bars.others > 0 {
        put!(
            out,
            "<li><i class=\"c{LARGEST}\"></i>others <span class=\"quiet\">{}</span></li>",
            Bytes(bars.others)
        );
    }
    put!(out, "</ul></figcaption></figure>");
}

fn table(out: &mut String, view: &View<'_>, bars: &Bars<'_>) {
    let start = view.query.range.start(view.status.now);
    let (count, span) = view.query.range.bars();
    put!(
        out,
        "<details><summary>The same as a table</summary><div class=\"wide\" role=\"region\" tabindex=\"0\" \
         aria-label=\"Bytes that left, as a table\"><table><caption class=\"hidden\">Bytes that left, by time and \
         destination</caption><thead><tr><th scope=\"col\">{}</th><th scope=\"col\" class=\"n\">All</th>\
         <th scope=\"col\" class=\"n\">Delivered</th><th scope=\"col\" class=\"n\">Failed</th>",
        match view.query.range {
            Range::Day => "Hour, UTC",
            Range::Month => "Day, UTC",
            Range::Year => "Week from",
        }
    );
    for (name, _) in &bars.largest {
        put!(out, "<th scope=\"col\" class=\"n\">{}</th>", Shown(name));
    }
    if bars.others > 0 {
        put!(out, "<th scope=\"col\" class=\"n\">Others</th>");
    }
    put!(out, "</tr></thead><tbody>");
    let series: Vec<usize> = (0..bars.largest.len())
        .chain((bars.others > 0).then_some(LARGEST))
        .collect();
    for (bar, index) in bars.bars.iter().rev().zip(1..) {
        if bar.total() == 0 && bar.delivered == 0 && bar.failed == 0 {
            continue;
        }
        put!(
            out,
            "<tr><th scope=\"row\">{}</th><td class=\"n\">{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td>",
            When(view.query.range, start + (count - index) * span),
            Bytes(bar.total()),
            Number(bar.delivered),
            Number(bar.failed)
        );
        for &series in &series {
            match bar.bytes[series] {
                0 => put!(out, "<td class=\"n\"></td>"),
                bytes => put!(out, "<td class=\"n\">{}</td>", Bytes(bytes)),
            }
        }
        put!(out, "</tr>");
    }
    put!(out, "</tbody></table></div></details>");
}

/// The start of a bar, as text: a title holds no elements.
struct When(Range, i64);

impl std::fmt::Display for When {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.0, super::text::moment(self.1)) {
            (Range::Day, Some(time)) => write!(f, "{} {:02}:00", time.date(), time.hour()),
            _ => Date(self.1).fmt(f),
        }
    }
}
