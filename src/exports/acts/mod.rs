//! The owner's acts: what they are, how they are asked for, and what comes of them. The writer carries them out one
//! after the other (`running`, `bulk`), and each is a row of the ledger in the same commit.
//!
//! Not here: who may act, and how that reaches this process (`owner`).

pub(super) mod bulk;
pub(crate) mod running;
pub mod subject;

use std::fmt;
use std::time::Duration;

use crossbeam_channel::{Sender, bounded};
use serde::de::DeserializeOwned;
use serde::ser::SerializeStruct;
use serde::{Serialize, Serializer};
use uuid::Uuid;

use super::{Exports, store};

/// The longest pause that has an end.
const LONGEST_PAUSE: Duration = Duration::from_secs(10 * 366 * 24 * 60 * 60);
/// The longest label, in characters.
const LONGEST_LABEL: usize = 100;

/// What the owner wants done. A subject is text as the owner typed it: see [`subject::Subject::parse`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Act {
    /// Hold what a subject means, for a while or until it is resumed.
    Pause(String, Option<Duration>),
    /// End the pause of this subject.
    Resume(String),
    /// Try again now instead of after a wait.
    Retry(Target),
    /// Finish exports without sending them.
    Cancel(Target),
    /// Cancel what waits, and delete results, labels and the bodies of the ledger's rows.
    Forget(String),
    /// Give a sender a name of the owner's own; an empty one takes it away.
    Label {
        /// The sender.
        who: String,
        /// Its new label.
        label: String,
    },
    /// Note that the owner knows a destination.
    Seen(String),
    /// Show the payload and the URL of an export that waits.
    Show(Uuid),
}

/// One export, or all of a subject.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// The export with this id.
    Export(Uuid),
    /// All exports of the subject that this text means.
    Subject(String),
}

/// What came of an act, in JSON `{"done": …, "uri": …, "payload": …}`.
#[derive(Debug, Default)]
pub struct Acted {
    /// A sentence for the owner.
    pub done: String,
    /// The export's full URL, if it was to be shown.
    pub url: Option<String>,
    /// The export's payload, if it was to be shown.
    pub payload: Option<Vec<u8>>,
}

/// Why an act was not carried out. The text says what to do.
#[derive(Debug)]
pub enum ActError {
    /// It makes no sense.
    Malformed(String),
    /// Nothing of this name is known.
    NotFound(String),
    /// It is not possible as things are.
    Conflict(String),
    /// The store cannot be read or written.
    Storage(store::Error),
    /// The service is stopping.
    Stopping,
}

impl ActError {
    /// The status and the code that its sender is told.
    pub fn status(&self) -> (u16, &'static str) {
        match self {
            Self::Malformed(_) => (400, "malformed"),
            Self::NotFound(_) => (404, "not_found"),
            Self::Conflict(_) => (409, "conflict"),
            Self::Storage(_) => (503, "storage_failed"),
            Self::Stopping => (503, "stopping"),
        }
    }
}

impl fmt::Display for ActError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Malformed(why) | Self::NotFound(why) | Self::Conflict(why) => f.write_str(why),
            Self::Storage(error) => write!(
                f,
                "it could not be written to the store: {error}; see that the disk has room, and try again"
            ),
            Self::Stopping => f.write_str("the service is stopping: try again when it runs"),
        }
    }
}

impl From<store::Error> for ActError {
    fn from(error: store::Error) -> Self {
        Self::Storage(error)
    }
}

impl Serialize for Acted {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut acted = serializer.serialize_struct("Acted", 3)?;
        acted.serialize_field("done", &self.done)?;
        if let Some(url) = &self.url {
            acted.serialize_field("uri", url)?;
        }
        if let Some(payload) = &self.payload {
            // It was checked to be JSON text when it was accepted.
            acted.serialize_field("payload", &String::from_utf8_lossy(payload))?;
        }
        acted.end()
    }
}

/// The bodies of requests for acts.
mod bodies {
    use serde::Deserialize;

    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    pub struct Pause {
        pub subject: String,
        pub r#for: Option<String>,
    }

    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    pub struct Resume {
        pub subject: String,
    }

    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    pub struct Target {
        pub id: Option<String>,
        pub destination: Option<String>,
    }

    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    pub struct Forget {
        pub who: Option<String>,
        pub destination: Option<String>,
    }

    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    pub struct Label {
        pub who: String,
        pub label: String,
    }

    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    pub struct Seen {
        pub destination: String,
    }

    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    pub struct Show {
        pub id: String,
    }
}

impl Act {
    /// The last parts of the paths of acts.
    pub const NAMES: [&str; 8] = [
        "pause", "resume", "retry", "cancel", "forget", "label", "seen", "show",
    ];

    /// Reads an act from the last part of its path, like `pause`, and its body, which is JSON.
    ///
    /// # Errors
    /// There is no such act, or the body is not what it takes.
    pub fn read(name: &str, body: &[u8]) -> Result<Self, ActError> {
        Ok(match name {
            "pause" => {
                let shape =
                    r#"{"subject":"all","for":"2h"}, and without "for" until it is resumed"#;
                let bodies::Pause { subject, r#for } = fields(name, body, shape)?;
                Self::Pause(subject, r#for.as_deref().map(length).transpose()?)
            }
            "resume" => {
                let bodies::Resume { subject } = fields(name, body, r#"{"subject":"all"}"#)?;
                Self::Resume(subject)
            }
            "retry" => Self::Retry(target(name, body)?),
            "cancel" => Self::Cancel(target(name, body)?),
            "forget" => {
                let shape = r#"{"who":"…"} or {"destination":"…"}"#;
                match fields(name, body, shape)? {
                    bodies::Forget {
                        who: Some(who),
                        destination: None,
                    } => Self::Forget(format!("who:{}", who.strip_prefix("who:").unwrap_or(&who))),
                    bodies::Forget {
                        who: None,
                        destination: Some(destination),
                    } => Self::Forget(destination),
                    _ => return Err(malformed(name, shape)),
                }
            }
            "label" => {
                let shape = r#"{"who":"…","label":"…"}"#;
                let bodies::Label { who, label } = fields(name, body, shape)?;
                Self::Label { who, label }
            }
            "seen" => {
                let bodies::Seen { destination } = fields(name, body, r#"{"destination":"…"}"#)?;
                Self::Seen(destination)
            }
            "show" => {
                let bodies::Show { id } = fields(name, body, r#"{"id":"…"}"#)?;
                Self::Show(export(&id)?)
            }
            _ => {
                return Err(ActError::NotFound(
                    "there is no such act: there are pause, resume, retry, cancel, forget, label, seen and \
                     show"
                        .into(),
                ));
            }
        })
    }
}

fn target(name: &str, body: &[u8]) -> Result<Target, ActError> {
    let shape = r#"{"id":"…"} or {"destination":"…"}"#;
    match fields(name, body, shape)? {
        bodies::Target {
            id: Some(id),
            destination: None,
        } => Ok(Target::Export(export(&id)?)),
        bodies::Target {
            id: None,
            destination: Some(destination),
        } => Ok(Target::Subject(destination)),
        _ => Err(malformed(name, shape)),
    }
}

fn fields<T: DeserializeOwned>(name: &str, body: &[u8], shape: &str) -> Result<T, ActError> {
    // serde takes an array for a struct too, by the order of its fields.
    if body.trim_ascii_start().first() == Some(&b'[') {
        return Err(malformed(name, shape));
    }
    serde_json::from_slice(body).map_err(|_| malformed(name, shape))
}

fn malformed(name: &str, shape: &str) -> ActError {
    ActError::Malformed(format!("{name} takes a JSON object: {shape}"))
}

fn export(id: &str) -> Result<Uuid, ActError> {
    id.trim().parse().map_err(|_| {
        ActError::Malformed(
            "that is not the id of an export, which apps get and the ledger shows".into(),
        )
    })
}

/// How long a pause is to last.
fn length(text: &str) -> Result<Duration, ActError> {
    match humantime::parse_duration(text.trim()) {
        Ok(length) if !length.is_zero() && length <= LONGEST_PAUSE => Ok(length),
        _ => Err(ActError::Malformed(
            "a pause lasts for a time like 30m, 2h or 1day: leave it out to pause until you resume"
                .into(),
        )),
    }
}

impl Exports {
    /// Carries out an act of the owner. Blocks until it is on disk, and while others are carried out before it. An act
    /// on many exports takes a commit for each hundred of them.
    ///
    /// # Errors
    /// It was not carried out; or, if it was an act on many exports, not on all of them.
    pub fn act(&self, act: Act) -> Result<Acted, ActError> {
        let (reply, answer) = bounded(1);
        let request = Request { act, reply };
        self.acts.send(request).map_err(|_| ActError::Stopping)?;
        answer.recv().unwrap_or(Err(ActError::Stopping))
    }
}

/// An act for the writer.
pub(super) struct Request {
    act: Act,
    /// Dropped without an answer when the service stops.
    reply: Sender<Result<Acted, ActError>>,
}

/// Checks a label.
fn checked_label(label: &str) -> Result<&str, ActError> {
    let label = label.trim();
    if label.chars().count() > LONGEST_LABEL || label.chars().any(char::is_control) {
        return Err(ActError::Malformed(format!(
            "a label is one line of at most {LONGEST_LABEL} characters"
        )));
    }
    if subject::Subject::from_stored(label).is_some() || label.contains("://") {
        return Err(ActError::Malformed(
            "a label is not `all` or a URL, and does not begin with who:, host: or destination:, as acts take \
             these for something else"
                .into(),
        ));
    }
    Ok(label)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn acts_are_read_from_their_name_and_body() {
        let read = |name: &str, body: &str| Act::read(name, body.as_bytes()).unwrap();
        let id = Uuid::now_v7();
        let text = |text: &str| text.to_owned();
        assert_eq!(
            read("pause", r#"{"subject":"all","for":"2h"}"#),
            Act::Pause(text("all"), Some(Duration::from_secs(7200)))
        );
        assert_eq!(
            read("pause", r#"{"subject":"x"}"#),
            Act::Pause(text("x"), None)
        );
        assert_eq!(
            read("resume", r#" {"subject":"x"}"#),
            Act::Resume(text("x"))
        );
        assert_eq!(
            read("retry", &format!(r#"{{"id":"{id}"}}"#)),
            Act::Retry(Target::Export(id))
        );
        assert_eq!(
            read("cancel", r#"{"destination":"a.example"}"#),
            Act::Cancel(Target::Subject(text("a.example")))
        );
        assert_eq!(
            read("forget", r#"{"who":"10.0.0.1"}"#),
            Act::Forget(text("who:10.0.0.1"))
        );
        assert_eq!(read("show", &format!(r#"{{"id":"{id}"}}"#)), Act::Show(id));
    }

    #[test]
    fn what_is_no_act_is_refused_with_what_to_send() {
        for (name, body) in [
            ("pause", ""),
            ("pause", "[\"all\"]"),
            ("pause", r#"{"subject":1}"#),
            ("pause", r#"{"subject":"all","until":"x"}"#),
            ("pause", r#"{"subject":"all","for":"0s"}"#),
            ("pause", r#"{"subject":"all","for":"900years"}"#),
            ("resume", r#"{"subject":"all","for":"2h"}"#),
            ("retry", "{}"),
            ("cancel", r#"{"id":"x"}"#),
            (
                "cancel",
                r#"{"id":"00000000-0000-0000-0000-000000000000","destination":"x"}"#,
            ),
            ("forget", r#"{"who":"a","destination":"b"}"#),
            ("show", r#"{"id":null}"#),
        ] {
            let error = Act::read(name, body.as_bytes()).unwrap_err();
            assert_eq!(error.status(), (400, "malformed"), "{name} {body}");
        }
        assert_eq!(Act::read("delete", b"{}").unwrap_err().status().0, 404);
    }
}
