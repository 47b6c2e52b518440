//! The text format of Prometheus, version 0.0.4.
//!
//! Not here: which metrics there are ([`super::Metrics`], [`super::process`]).

use std::fmt::Write as _;

use super::counters::{Family, Histogram};

/// The text while it is being made. Writing to a String cannot fail.
pub struct Text {
    text: String,
    /// What the names of metrics begin with.
    prefix: &'static str,
    /// The metric that samples belong to, without the prefix.
    name: &'static str,
}

impl Text {
    /// Without any metric yet. The names of metrics begin with `prefix`.
    pub fn new(prefix: &'static str) -> Self {
        Self {
            text: String::with_capacity(16 * 1024),
            prefix,
            name: "",
        }
    }

    /// From now on the names of metrics begin with this.
    pub fn followed_by(self, prefix: &'static str) -> Self {
        Self { prefix, ..self }
    }

    /// Begins a metric that only rises, whose samples follow. `about` is its name without the prefix, and what
    /// it means.
    pub fn counter(&mut self, about: &'static str) -> &mut Self {
        self.metric("counter", about)
    }

    /// The same for one that may fall too.
    pub fn gauge(&mut self, about: &'static str) -> &mut Self {
        self.metric("gauge", about)
    }

    /// The same for a histogram.
    pub fn histogram(&mut self, about: &'static str) -> &mut Self {
        self.metric("histogram", about)
    }

    fn metric(&mut self, kind: &str, about: &'static str) -> &mut Self {
        let (name, help) = about.split_once(": ").unwrap_or((about, ""));
        self.name = name;
        let prefix = self.prefix;
        let _ = write!(
            self.text,
            "# HELP {prefix}{name} {help}\n# TYPE {prefix}{name} {kind}\n"
        );
        self
    }

    /// The only sample of a metric without labels.
    pub fn value(&mut self, value: f64) -> &mut Self {
        self.line("", "", value)
    }

    /// One of several samples. Nothing is escaped, as all labels are from this program.
    pub fn sample(&mut self, label: &str, of: &str, value: f64) -> &mut Self {
        self.line("", &format!("{{{label}=\"{of}\"}}"), value)
    }

    /// The samples of a family of counters.
    pub fn family<const N: usize>(&mut self, label: &str, family: &Family<N>) {
        for (name, count) in family.names.iter().zip(&family.counts) {
            self.sample(label, name, count.value());
        }
    }

    /// The samples of a histogram: each bucket includes those before it.
    pub fn buckets<const N: usize>(&mut self, histogram: &Histogram<N>) {
        let mut count = 0.0;
        for (bound, more) in histogram.bounds.iter().zip(&histogram.counts) {
            count += more.value();
            self.line(
                "_bucket",
                &format!("{{le=\"{}\"}}", *bound as f64 / 1e6),
                count,
            );
        }
        count += histogram.longer.value();
        self.line("_bucket", "{le=\"+Inf\"}", count);
        self.line("_sum", "", histogram.sum.value() / 1e6);
        self.line("_count", "", count);
    }

    /// One sample, whose name has this suffix. The labels are written as they are.
    pub fn line(&mut self, suffix: &str, labels: &str, value: f64) -> &mut Self {
        let (prefix, name) = (self.prefix, self.name);
        let _ = writeln!(self.text, "{prefix}{name}{suffix}{labels} {value}");
        self
    }

    /// The whole text.
    pub fn into_string(self) -> String {
        self.text
    }
}
