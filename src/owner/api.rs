//! What the owner is told of the service's state.
//!
//! Not here: who may ask ([`super::access`]).

use std::fs;
use std::time::{Duration, SystemTime};

use super::filter::millis;
use super::report::{self, Attention, Status};
use super::{Owner, reading, waiting};
use crate::auth::secret::Missing;
use crate::exports::store::evidence::Evidence;
use crate::exports::store::{FILE, Place};
use crate::metrics::Gauges;
use crate::version;

/// A certificate that ends sooner than this needs attention.
const RENEW: Duration = Duration::from_secs(14 * 24 * 60 * 60);
/// A disk with less room than this needs attention, in bytes.
const LEAST_FREE: u64 = 64 * 1024 * 1024;

/// The state of the service, and what in it needs the owner's attention, without the ledger's part if that cannot be
/// read: the status is wanted most when something is wrong with the store. Blocks for reading the store.
pub fn status(owner: &Owner, evidence: Option<&Evidence>, now: SystemTime) -> Status {
    let secret = owner.secret.key().err();
    let expires = owner
        .identity
        .as_ref()
        .and_then(|identity| identity.expires());
    let disk_free = disk_free(&owner.place);
    let mut status = Status {
        version: version::NUMBER.into(),
        now: millis(now),
        since: owner.exports.started(),
        attention: attention(secret, expires, disk_free, owner.is_exposed(), now),
        store: report::Store {
            bytes: store_bytes(&owner.place).unwrap_or(0),
            limit: Some(owner.limits.max_store),
            ledger_bytes: 0,
            ledger_limit: owner.limits.ledger.size,
        },
        disk_free,
        secret: report::Secret {
            ready: secret.is_none(),
            reason: secret.map(|Missing(reason)| reason.to_string()),
        },
        certificate: report::Certificate {
            expires_at: expires.map(millis),
        },
        admin: owner.port.map(|port| report::Admin {
            address: port.to_string(),
            url: owner.url(port),
        }),
        ..Status::default()
    };
    waiting::add(owner, &mut status);
    if let Some(evidence) = evidence {
        reading::add_ledger(evidence, &mut status);
    }
    status
}

/// What needs somebody to act, the worst first.
fn attention(
    secret: Option<Missing>,
    expires: Option<SystemTime>,
    disk_free: Option<u64>,
    is_open: bool,
    now: SystemTime,
) -> Vec<Attention> {
    let mut all = Vec::new();
    let mut note = |kind, text| {
        all.push(Attention {
            kind,
            text,
            act: None,
        });
    };
    if let Some(Missing(reason)) = secret {
        let text = format!(
            "Apps cannot export anything: there is no secret to check their tokens with, since {reason}."
        );
        note("secret", text);
    }
    if let Some(free) = disk_free.filter(|free| *free < LEAST_FREE) {
        let free = free / 1024 / 1024;
        let text = format!("The disk is almost full: {free} MiB are free. Make some room on it.");
        note("disk", text);
    }
    if let Some(expires) = expires {
        let day = humantime::format_rfc3339_seconds(expires).to_string();
        let day = day.split('T').next().unwrap_or_default();
        if expires <= now {
            let text = format!("The certificate expired on {day}: renew it, then send SIGHUP.");
            note("certificate", text);
        } else if expires < now + RENEW {
            let text = format!("The certificate expires on {day}: renew it, then send SIGHUP.");
            note("certificate", text);
        }
    }
    if is_open {
        note(
            "plain_http",
            "The owner's port is open to the network without TLS, so that others there can read the token: \
             give a certificate with --tls-pem, or listen on 127.0.0.1."
                .into(),
        );
    }
    all
}

/// The metrics, with what is true of the service at this moment.
pub fn metrics(owner: &Owner) -> String {
    let expires = owner
        .identity
        .as_ref()
        .and_then(|identity| identity.expires());
    owner.exports.metrics.render(&Gauges {
        disk_free: disk_free(&owner.place),
        certificate_expiry: expires.map(|expires| millis(expires) / 1000),
        secret_ready: owner.secret.key().is_ok(),
        ..owner.exports.gauges()
    })
}

/// What the database and its write-ahead log take on disk. None for a store in memory.
fn store_bytes(place: &Place) -> Option<u64> {
    let folder = place.folder()?;
    let size = |name: &str| fs::metadata(folder.join(name)).map_or(0, |file| file.len());
    Some(size(FILE) + size(&format!("{FILE}-wal")))
}

/// How many bytes of the disk that holds the data folder can still be used by this user.
fn disk_free(place: &Place) -> Option<u64> {
    let disk = rustix::fs::statvfs(place.folder()?).ok()?;
    Some(disk.f_bavail.saturating_mul(disk.f_frsize))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::UNIX_EPOCH;

    const NOW: u64 = 1_800_000_000;

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn kinds(expires: u64, free: u64, is_open: bool) -> Vec<&'static str> {
        let noted = attention(None, Some(at(expires)), Some(free), is_open, at(NOW));
        noted.iter().map(|item| item.kind).collect()
    }

    #[test]
    fn only_what_somebody_can_act_on_needs_attention() {
        let year = 365 * 24 * 60 * 60;
        assert!(kinds(NOW + year, LEAST_FREE, false).is_empty());
        assert_eq!(kinds(NOW + 1000, LEAST_FREE, false), ["certificate"]);
        assert_eq!(kinds(NOW, LEAST_FREE - 1, false), ["disk", "certificate"]);
        assert_eq!(kinds(NOW + year, LEAST_FREE, true), ["plain_http"]);
        let noted = attention(Some(Missing("it rains")), None, None, false, at(NOW));
        let text = &noted[0].text;
        assert!(text.contains("since it rains"), "{text}");
    }
}
