//! Decides whether an attempt's outcome is final, or how the export is tried again; pure.
//!
//! Not here: when it is tried again (`exports::queues`).

use std::time::{Duration, SystemTime};

use super::addresses::is_literal;
use super::attempt::{Kind, Outcome};
use crate::destination::Destination;
use crate::export::{Millis, Retry};

/// Whether an attempt's outcome is final (`None`), or how the export is to be tried again.
/// `plain_allowed` says whether there is any network that plain `http` may go to.
pub fn retry(
    outcome: &Outcome,
    destination: &Destination,
    plain_allowed: bool,
    retry_on: &[u16],
    now: SystemTime,
) -> Option<Retry> {
    match outcome {
        Outcome::Answered(answer) if retry_on.contains(&answer.status) => {
            let asked = answer
                .retry_after
                .as_deref()
                .and_then(|text| retry_after(text, now));
            Some(Retry {
                // These two are about the destination, any other status about what it was sent.
                to_end: !matches!(answer.status, 429 | 503),
                least_wait: asked.unwrap_or(0),
            })
        }
        Outcome::Answered(_) => None,
        Outcome::Failed(_) if is_hopeless(destination, plain_allowed) => None,
        Outcome::Failed(failure) => match failure.kind {
            Kind::Timeout | Kind::Closed | Kind::Protocol => Some(Retry {
                to_end: failure.connected,
                least_wait: 0,
            }),
            Kind::ForbiddenAddress | Kind::ForbiddenHttp
                if is_literal(destination.host_and_port().0) =>
            {
                None
            }
            // These may pass: routers that are offline, captive portals and wrong clocks cause them.
            Kind::Dns
            | Kind::Connect
            | Kind::Tls
            | Kind::ForbiddenAddress
            | Kind::ForbiddenHttp => Some(Retry {
                to_end: false,
                least_wait: 0,
            }),
            Kind::Lost => None,
        },
    }
}

/// Whether a destination can never be sent to, whatever addresses its name has.
pub fn is_hopeless(destination: &Destination, plain_allowed: bool) -> bool {
    !destination.is_encrypted() && !plain_allowed
}

/// How long `Retry-After` asks to wait: seconds, or a date (RFC 9110, section 10.2.3). None if it is
/// neither.
fn retry_after(text: &str, now: SystemTime) -> Option<Millis> {
    let text = text.trim();
    let wait = match text.parse::<u64>() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => httpdate::parse_http_date(text)
            .ok()?
            .duration_since(now)
            .unwrap_or_default(),
    };
    Some(Millis::try_from(wait.as_millis()).unwrap_or(Millis::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::delivery::attempt::{Answer, Failure};
    use proptest::prelude::*;

    const DOWN: Retry = Retry {
        to_end: false,
        least_wait: 0,
    };

    #[test]
    fn what_is_final_and_what_is_tried_again() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777);
        let failed = |kind, connected| {
            Outcome::Failed(Failure {
                kind,
                message: String::new(),
                connected,
            })
        };
        let to = |url: &str| Destination::parse(url).unwrap();
        let name = to("https://a.example/");
        for (kind, connected, to_end) in [
            (Kind::Dns, false, false),
            (Kind::Connect, false, false),
            (Kind::Timeout, false, false),
            (Kind::Timeout, true, true),
            (Kind::Closed, true, true),
            (Kind::Protocol, true, true),
            // A certificate speaks of the destination.
            (Kind::Tls, true, false),
            (Kind::ForbiddenAddress, false, false),
            (Kind::ForbiddenHttp, false, false),
        ] {
            let verdict = Retry {
                to_end,
                least_wait: 0,
            };
            for url in [&name, &to("http://a.example/"), &to("http://localhost:1/")] {
                let again = retry(&failed(kind, connected), url, true, &[], now);
                assert_eq!(again, Some(verdict), "{kind:?} {url:?}");
            }
            // No network is allowed, so no other address of the name would do.
            let again = retry(&failed(kind, connected), &name, false, &[], now);
            assert_eq!(again, Some(verdict), "{kind:?}");
            let plain = to("http://a.example/");
            let again = retry(&failed(kind, connected), &plain, false, &[], now);
            assert_eq!(again, None, "{kind:?}");
        }
        assert_eq!(
            retry(&failed(Kind::Lost, false), &name, true, &[], now),
            None
        );
        for literal in ["https://10.0.0.1/", "https://[::1]/", "https://127.1:9/"] {
            for kind in [Kind::ForbiddenAddress, Kind::ForbiddenHttp] {
                let again = retry(&failed(kind, false), &to(literal), true, &[], now);
                assert_eq!(again, None, "{literal}");
            }
            let again = retry(&failed(Kind::Connect, false), &to(literal), true, &[], now);
            assert_eq!(again, Some(DOWN), "{literal}");
        }
        let status = |status| {
            let answer = Answer {
                status,
                body: Vec::new(),
                truncated: false,
                retry_after: None,
                memory: None,
            };
            let again = retry(
                &Outcome::Answered(answer),
                &name,
                true,
                &[429, 500, 503],
                now,
            );
            again.map(|again| again.to_end)
        };
        assert_eq!(
            [200, 429, 500, 502, 503].map(status),
            [None, Some(false), Some(true), None, Some(false)]
        );
        let answered = |retry_after: Option<&str>| {
            let retry_after = retry_after.map(str::to_owned);
            Outcome::Answered(Answer {
                status: 503,
                body: Vec::new(),
                truncated: false,
                retry_after,
                memory: None,
            })
        };
        assert_eq!(retry(&answered(None), &name, true, &[429], now), None);
        for (text, wait) in [
            (None, 0),
            (Some("7"), 7_000),
            (Some("Sun, 06 Nov 1994 08:50:37 GMT"), 60_000),
            (Some("Sun, 06 Nov 1994 08:00:00 GMT"), 0),
            (Some("999999999999"), 999_999_999_999_000),
            (Some("soon"), 0),
        ] {
            let verdict = retry(&answered(text), &name, true, &[429, 503], now);
            assert_eq!(
                verdict,
                Some(Retry {
                    to_end: false,
                    least_wait: wait
                }),
                "{text:?}"
            );
        }
    }

    proptest! {
        #[test]
        fn no_retry_after_makes_the_reader_panic(text in ".{0,40}") {
            let wait = retry_after(&text, SystemTime::UNIX_EPOCH);
            prop_assert!(wait.is_none_or(|wait| wait >= 0));
        }
    }
}
