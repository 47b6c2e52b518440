//! `link`: where the owner looks, and a token for it.
//!
//! Not here: what a token allows ([`crate::owner::access`]).

use std::io::{self, Write};
use std::time::SystemTime;

use serde_json::Value;

use super::ask::ask;
use super::token::expiry;
use crate::auth::{Key, Macaroon};
use crate::config::LinkArgs;
use crate::key_file;
use crate::logging;
use crate::owner::KEY_FILE;

/// Prints the address of the owner's port, if the service runs and has one, and mints a token for it. How to
/// use them goes to stderr. Blocks for a minute at most.
///
/// # Errors
/// There is no key yet, an argument makes no sense, or the output cannot be written.
pub fn link(arguments: &LinkArgs, now: SystemTime) -> Result<(), String> {
    let folder = arguments.folder();
    let file = folder.join(KEY_FILE);
    let key = key_file::Key::read(&file)?.ok_or_else(|| {
        format!(
            "there is no {} yet: the service makes it at its first start; is this its --data-dir?",
            file.display()
        )
    })?;
    let mut caveats = Vec::new();
    if arguments.read_only || arguments.metrics {
        caveats.push("method = GET".to_owned());
    }
    if arguments.metrics {
        caveats.push("path = /metrics".to_owned());
    }
    if let Some(expires) = arguments.expires {
        caveats.push(expiry(expires, now)?);
    }
    let minted = Macaroon::mint(&Key::derive(key.bytes()), "owner", caveats);
    let token = minted.to_v1().ok_or("the token would be too long")?;
    let answer = ask(folder, "GET", "/api/status", None);
    let status = answer.and_then(|(_, body)| {
        serde_json::from_str::<Value>(&body).map_err(|error| error.to_string())
    });
    let url = status.map(|status| status["admin"]["url"].as_str().map(str::to_owned));
    let hint = match &url {
        Ok(Some(_)) => {
            "open the first line in a browser; the second is the user name, without a password\n"
        }
        Ok(None) => {
            "the service has no port for the owner: start it again with --admin 127.0.0.1:8081 or \
             EXPORT_ADMIN=127.0.0.1:8081; this is the token, which a browser takes as the user name, without a \
             password\n"
        }
        Err(_) => {
            "the service does not run: start it, with --admin 127.0.0.1:8081 or EXPORT_ADMIN=127.0.0.1:8081; this \
             is the token, which a browser takes as the user name, without a password\n"
        }
    };
    logging::print(hint.into());
    let mut out = io::stdout().lock();
    let url = url.ok().flatten().map(|url| format!("{url}\n"));
    writeln!(out, "{}{token}", url.unwrap_or_default()).map_err(|error| error.to_string())
}
