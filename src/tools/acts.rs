//! The owner's acts as commands: `pause`, `resume`, `retry`, `cancel`, `forget`, `label`, `seen` and `show`.
//!
//! Not here: what they do ([`crate::exports::acts`]).

use std::io::{self, IsTerminal, Write};
use std::path::Path;

use serde_json::{Value, json};
use uuid::Uuid;

use super::ask::ask;
use crate::config::{
    ExportArgs, ForgetArgs, LabelArgs, PauseArgs, ResumeArgs, SeenArgs, TargetArgs,
};
use crate::logging;
use crate::unseen::escaped;

/// Why an act was not carried out.
pub enum Failed {
    /// The arguments make no sense.
    Usage(String),
    /// It is not possible, or nothing answers.
    Refused(String),
}

/// `pause`. Like all of these, blocks until the service has answered, for a minute at most.
///
/// # Errors
/// It was not carried out. The text says what to do.
pub fn pause(arguments: &PauseArgs) -> Result<(), Failed> {
    let mut body = json!({ "subject": arguments.subject });
    if let Some(length) = &arguments.r#for {
        body["for"] = json!(length);
    }
    act(arguments.folder(), "pause", &body)
}

/// `resume`.
///
/// # Errors
/// As for [`pause`].
pub fn resume(arguments: &ResumeArgs) -> Result<(), Failed> {
    act(
        arguments.folder(),
        "resume",
        &json!({ "subject": arguments.subject }),
    )
}

/// `retry`.
///
/// # Errors
/// As for [`pause`].
pub fn retry(arguments: &TargetArgs) -> Result<(), Failed> {
    act(arguments.folder(), "retry", &target(&arguments.target))
}

/// `cancel`.
///
/// # Errors
/// As for [`pause`].
pub fn cancel(arguments: &TargetArgs) -> Result<(), Failed> {
    act(arguments.folder(), "cancel", &target(&arguments.target))
}

/// `forget`.
///
/// # Errors
/// As for [`pause`].
pub fn forget(arguments: &ForgetArgs) -> Result<(), Failed> {
    act(
        arguments.folder(),
        "forget",
        &json!({ "destination": arguments.subject }),
    )
}

/// `label`.
///
/// # Errors
/// As for [`pause`].
pub fn label(arguments: &LabelArgs) -> Result<(), Failed> {
    let body = json!({ "who": arguments.who, "label": arguments.label });
    act(arguments.folder(), "label", &body)
}

/// `seen`.
///
/// # Errors
/// As for [`pause`].
pub fn seen(arguments: &SeenArgs) -> Result<(), Failed> {
    act(
        arguments.folder(),
        "seen",
        &json!({ "destination": arguments.destination }),
    )
}

/// `show`: the payload goes to stdout, exactly as it will be sent unless that is a terminal.
///
/// # Errors
/// As for [`pause`].
pub fn show(arguments: &ExportArgs) -> Result<(), Failed> {
    let answer = ask_for(arguments.folder(), "show", &json!({ "id": arguments.id }))?;
    let text = |field: &str| answer[field].as_str().unwrap_or_default();
    logging::print(format!(
        "{}\nPOST {}\n",
        escaped(text("done")),
        escaped(text("uri"))
    ));
    let mut out = io::stdout();
    let payload = text("payload");
    let written = match out.is_terminal() {
        true => writeln!(out, "{}", escaped(payload)),
        false => out.write_all(payload.as_bytes()),
    };
    written.map_err(|error| Failed::Refused(error.to_string()))
}

/// The body for one export or all of a subject.
fn target(text: &str) -> Value {
    match text.trim().parse::<Uuid>() {
        Ok(id) => json!({ "id": id.to_string() }),
        Err(_) => json!({ "destination": text }),
    }
}

fn act(folder: &Path, name: &str, body: &Value) -> Result<(), Failed> {
    let answer = ask_for(folder, name, body)?;
    let done = escaped(answer["done"].as_str().unwrap_or_default());
    writeln!(io::stdout(), "{done}").map_err(|error| Failed::Refused(error.to_string()))
}

fn ask_for(folder: &Path, name: &str, body: &Value) -> Result<Value, Failed> {
    let path = format!("/api/{name}");
    let (status, answer) = ask(folder, "POST", &path, Some(body)).map_err(Failed::Refused)?;
    let answer: Value = serde_json::from_str(&answer).unwrap_or_default();
    if status == 200 {
        return Ok(answer);
    }
    let message = match answer["error"]["message"].as_str() {
        Some(message) => escaped(message),
        None => format!("the service answered {status}"),
    };
    Err(match status {
        400 => Failed::Usage(message),
        _ => Failed::Refused(message),
    })
}
