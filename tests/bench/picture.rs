//! The picture of a run, as an SVG: what an operation costs, and whether rates fall with what waits. Its
//! colours can be read on a light and on a dark background.

use std::fmt::Write;

use crate::report::{Figure, Limit, Report, Row, kind, thousands};

const WIDTH: f64 = 760.0;
/// Where bars and lines begin.
const LEFT: f64 = 250.0;
/// Where the longest bar ends, to leave room for its number.
const RIGHT: f64 = WIDTH - 130.0;
/// Of a figure, with its limit.
const ROW_HEIGHT: f64 = 34.0;
const BAR: f64 = 13.0;
const PLOT_HEIGHT: f64 = 170.0;

const STYLE: &str = "
    text { font: 12px sans-serif; fill: #6e7781 }
    .title { font-weight: bold }
    .service { fill: #2f81f7 }
    .limit { fill: #8c959f }
    .axis { stroke: #8c959f; stroke-width: 1 }
    polyline { fill: none; stroke-width: 2 }
";
/// The colours of the lines.
const COLOURS: [&str; 3] = ["#2f81f7", "#d4731f", "#2da44e"];

pub fn draw(report: &Report) -> String {
    let figures: Vec<_> = report.rows.iter().flat_map(figures).collect();
    let mut body = String::new();
    let mut y = 24.0;
    y = bars(&mut body, y, &figures);
    let waiting = report.rows.iter().flat_map(|row| &row.figures);
    let waiting: Vec<_> = waiting
        .filter(|figure| figure.waiting.is_some() && figure.cpu.is_some())
        .collect();
    if !waiting.is_empty() {
        y = lines(&mut body, y + 24.0, &waiting);
    }
    for line in report.conditions().lines() {
        text(&mut body, 10.0, y, "start", line);
        y += 16.0;
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{y}\" viewBox=\"0 0 {WIDTH} {y}\">\n\
         <style>{STYLE}</style>\n{body}</svg>\n"
    )
}

/// A row's figures that have a cost, with a limit that has one too. One connection alone takes mostly
/// switches from thread to thread, and would make all other bars short.
fn figures(row: &Row) -> impl Iterator<Item = (&Figure, f64, &Limit, f64)> {
    row.figures.iter().filter_map(|figure| {
        let limit = figure.limits.iter().find(|limit| limit.cpu.is_some())?;
        let is_shown = figure.waiting.is_none() && !figure.what.ends_with("1 connection");
        is_shown.then_some((figure, figure.cpu?, limit, limit.cpu?))
    })
}

/// Draws what operations cost from `y` on, and returns where it ends.
fn bars(out: &mut String, mut y: f64, figures: &[(&Figure, f64, &Limit, f64)]) -> f64 {
    title(
        out,
        y,
        "CPU µs for one operation: the service, and below it the limit",
    );
    let costs = figures.iter().flat_map(|(_, own, _, limit)| [*own, *limit]);
    let scale = (RIGHT - LEFT) / costs.fold(1.0, f64::max);
    y += 14.0;
    for (figure, own, limit, its) in figures {
        text(out, LEFT - 8.0, y + BAR + 3.0, "end", &figure.what);
        for (class, cost, name, y) in [
            ("service", own, "", y),
            ("limit", its, limit.name.as_str(), y + BAR),
        ] {
            let width = cost * scale;
            let _ = writeln!(
                out,
                r#"<rect class="{class}" x="{LEFT}" y="{y:.1}" width="{width:.1}" height="{:.1}"/>"#,
                BAR - 1.0
            );
            let label = format!("{cost:.0} {name}");
            text(out, LEFT + width + 5.0, y + BAR - 1.0, "start", &label);
        }
        y += ROW_HEIGHT;
    }
    y
}

/// Draws rates over the count of waiting exports from `y` on, and returns where it ends.
fn lines(out: &mut String, y: f64, figures: &[&Figure]) -> f64 {
    title(
        out,
        y,
        "operations per second, with so many exports waiting",
    );
    let (top, bottom) = (y + 18.0, y + 18.0 + PLOT_HEIGHT);
    let highest = figures
        .iter()
        .map(|figure| figure.value)
        .fold(1.0, f64::max);
    let decades = |figure: &Figure| figure.waiting.map_or(0.0, |count| (count as f64).log10());
    let first = figures
        .iter()
        .map(|figure| decades(figure))
        .fold(f64::MAX, f64::min);
    let last = figures
        .iter()
        .map(|figure| decades(figure))
        .fold(0.0, f64::max);
    let left = 80.0;
    let x_of = |figure: &Figure| {
        let part = (decades(figure) - first) / (last - first).max(1.0);
        left + 20.0 + part * (RIGHT - left - 40.0)
    };
    let y_of = |rate: f64| bottom - rate / highest * (bottom - top);
    for rate in [0.0, highest / 2.0, highest] {
        let y = y_of(rate);
        let _ = writeln!(
            out,
            r#"<line class="axis" x1="{left}" x2="{RIGHT}" y1="{y:.1}" y2="{y:.1}" opacity="0.4"/>"#
        );
        text(out, left - 8.0, y + 4.0, "end", &thousands(rate));
    }
    let mut kinds: Vec<&str> = figures.iter().map(|figure| kind(&figure.what)).collect();
    kinds.dedup();
    kinds.truncate(COLOURS.len());
    let mut name_y = top + 4.0;
    for (name, colour) in kinds.iter().zip(COLOURS) {
        let points: Vec<_> = figures
            .iter()
            .filter(|figure| kind(&figure.what) == *name)
            .map(|figure| (x_of(figure), y_of(figure.value)))
            .collect();
        let path: Vec<_> = points
            .iter()
            .map(|(x, y)| format!("{x:.1},{y:.1}"))
            .collect();
        let path = path.join(" ");
        let _ = writeln!(out, r#"<polyline points="{path}" stroke="{colour}"/>"#);
        for (x, y) in &points {
            let _ = writeln!(
                out,
                r#"<circle cx="{x:.1}" cy="{y:.1}" r="3" fill="{colour}"/>"#
            );
        }
        let _ = writeln!(
            out,
            r#"<text x="{}" y="{name_y:.1}" style="fill: {colour}">{name}</text>"#,
            RIGHT + 8.0,
        );
        name_y += 18.0;
    }
    for figure in figures
        .iter()
        .filter(|figure| kind(&figure.what) == kinds[0])
    {
        let count = figure.waiting.map_or(0.0, |count| count as f64);
        text(
            out,
            x_of(figure),
            bottom + 18.0,
            "middle",
            &thousands(count),
        );
    }
    bottom + 50.0
}

fn title(out: &mut String, y: f64, title: &str) {
    let _ = writeln!(out, r#"<text class="title" x="10" y="{y}">{title}</text>"#);
}

fn text(out: &mut String, x: f64, y: f64, anchor: &str, text: &str) {
    let text = text.replace('&', "&amp;").replace('<', "&lt;");
    let _ = writeln!(
        out,
        r#"<text x="{x:.1}" y="{y:.1}" text-anchor="{anchor}">{text}</text>"#
    );
}
