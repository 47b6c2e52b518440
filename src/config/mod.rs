//! The only reader of arguments, environment and secrets folder. It yields one [`Config`] in which
//! everything has been checked before the first thread starts.
//!
//! Not here: whether the data folder can be used, which only opening it shows, how a value is
//! written (`config::values`), and what works and may not be meant (`config::warnings`).

pub mod usage;
mod values;
pub mod variables;
pub mod warnings;

use std::env;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::builder::{
    OsStringValueParser, PathBufValueParser, PossibleValue, StringValueParser, TypedValueParser,
};
use clap::{Arg, ArgAction, Args, Parser, Subcommand, value_parser};
use log::LevelFilter;

use crate::arbiter;
use crate::arbiter::curve::{self, Endpoint};
use crate::auth::Key;
use crate::delivery::addresses::Rules;
use crate::delivery::signature::SigningKey;
use crate::delivery::tls::Trust;
use crate::delivery::{attempt, worker};
use crate::exports::Limits;
use crate::exports::store::{LedgerLimits, Place};
use crate::gate;
use crate::gate::tls::Identity;
use crate::logging::Format;
use crate::owner::access::Hosts;
use crate::version;
use warnings::Warning;

/// The memory that large requests and answers share, in bytes.
const LARGE_REQUESTS: usize = 16 * 1024 * 1024;
/// The smallest store that has room for anything, in bytes.
const LEAST_STORE: u64 = 256 * 1024;
/// The longest `--attempt-timeout`. A far longer one would end after all times that the system can tell.
const LONGEST_ATTEMPT: Duration = Duration::from_secs(24 * 60 * 60);
/// The largest file that is read from the secrets folder, in bytes. A Databox's have about a hundred.
const LONGEST_FILE: u64 = 4096;
/// The file with the token by which the arbiter knows this service.
const ARBITER_TOKEN: &str = "ARBITER_TOKEN";
/// The file with the arbiter's public key, which authenticates it.
const ZMQ_PUBLIC_KEY: &str = "ZMQ_PUBLIC_KEY";

/// Where the macaroon secret comes from.
#[derive(Debug)]
pub enum SecretSource {
    /// It was given; this is the key derived from it.
    Given(Key),
    /// The arbiter is asked for it.
    Arbiter(arbiter::Settings),
}

/// What the service runs with.
#[derive(Debug)]
pub struct Config {
    /// Where to listen; port 0 lets the system choose.
    pub address: SocketAddr,
    /// The name that a token's `target` must be.
    pub name: String,
    /// Where the root key of all tokens comes from.
    pub secret: SecretSource,
    /// Where exports are stored.
    pub place: Place,
    /// Threads that serve requests.
    pub threads: usize,
    /// The limits of connections, and the certificate that clients see.
    pub connections: gate::Settings,
    /// How many exports may be stored, and for how long.
    pub limits: Limits,
    /// How each attempt is made.
    pub attempts: attempt::Settings,
    /// What counts as a failed attempt, and how many attempts run at a time.
    pub worker: worker::Settings,
    /// The format of log lines.
    pub log_format: Format,
    /// The least severe level that is logged.
    pub log_level: LevelFilter,
    /// Where the owner's port is to listen; none without one.
    pub admin: Option<SocketAddr>,
    /// The names by which the owner may address this box.
    pub admin_hosts: Hosts,
    /// Settings that work and may not be meant.
    pub warnings: Vec<Warning>,
    /// Where systemd wants to be told of the start and the stop; see [`crate::systemd`].
    pub notify_socket: Option<OsString>,
}

/// A setting that cannot work. The text names it, its value unless that is secret, and what to do.
#[derive(Debug)]
pub struct ConfigError(String);

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Ignores blanks around a value, which env files and folded YAML leave there. Not for secrets, which
/// may begin or end with one.
#[derive(Clone)]
struct Trimmed<P>(P);

impl<P: TypedValueParser> TypedValueParser for Trimmed<P> {
    type Value = P::Value;

    fn parse_ref(
        &self,
        command: &clap::Command,
        argument: Option<&Arg>,
        value: &OsStr,
    ) -> Result<P::Value, clap::Error> {
        let trimmed = OsStr::from_bytes(value.as_bytes().trim_ascii());
        self.0.parse_ref(command, argument, trimmed)
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        self.0.possible_values()
    }
}

/// The entries of a list, given in one value or in several. No entry can contain a blank, so blanks
/// separate them as commas do; empty entries are skipped.
fn entries(given: &[String]) -> impl Iterator<Item = &str> {
    given
        .iter()
        .flat_map(|text| text.split(|c: char| c == ',' || c.is_whitespace()))
        .filter(|entry| !entry.is_empty())
}

/// The command line.
#[derive(Parser)]
#[command(
    name = "export-service",
    version = version::full(),
    about = "The only way data leaves a Databox: checks, queues and delivers exports",
    args_conflicts_with_subcommands = true
)]
pub struct Cli {
    /// The default is to serve.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// The settings of `serve`, if no subcommand is given.
    #[command(flatten)]
    pub serve: ServeArgs,
}

/// The subcommands.
#[derive(Subcommand)]
pub enum Command {
    /// Run the service (the default)
    Serve(Box<ServeArgs>),
    /// Mint a macaroon that allows exports to one destination, and print it; or say what one is good for
    Token(TokenArgs),
    /// Be a small destination on 127.0.0.1: print what arrives and answer with it
    Sink(SinkArgs),
    /// Check whether an export could go to a URL now, without sending one
    Check(CheckArgs),
    /// Ask the local service for /status; exit 0 if it is active, else 1
    Healthcheck(HealthcheckArgs),
    /// Show the state of the local service; exit 0 if all is well, else 1
    Status(StatusArgs),
    /// Print the address of the owner's port, and a token for it
    Link(LinkArgs),
    /// Show what left the box: attempts, refusals, the owner's acts, and whether the record is whole
    Ledger(LedgerArgs),
    /// Hold exports until they are resumed, or for a while
    Pause(PauseArgs),
    /// End a pause
    Resume(ResumeArgs),
    /// Try an export, or all to a destination, now instead of after a wait
    Retry(TargetArgs),
    /// Finish an export, or all to a destination, without sending
    Cancel(TargetArgs),
    /// Cancel what waits and delete what is known of an app or a destination
    Forget(ForgetArgs),
    /// Give an app a name of your own
    Label(LabelArgs),
    /// Say that you know a destination that is marked as new
    Seen(SeenArgs),
    /// Show URL and payload of an export that waits
    Show(ExportArgs),
}

/// Where the service listens.
#[derive(Args)]
pub struct ListenArgs {
    /// Port to listen on; 0 lets the system choose one, which the log shows
    #[arg(long, env = "DATABOX_LOCAL_PORT", default_value_t = 8080, value_parser = Trimmed(values::port))]
    port: u16,
    /// Address to listen on, like 127.0.0.1 or localhost
    #[arg(long, env = "EXPORT_BIND", default_value_t = IpAddr::V4(Ipv4Addr::UNSPECIFIED), value_parser = Trimmed(values::address))]
    bind: IpAddr,
}

impl ListenArgs {
    /// The address to listen on.
    pub fn address(&self) -> SocketAddr {
        SocketAddr::new(self.bind, self.port)
    }
}

/// Which certificate clients see.
#[derive(Args)]
pub struct TlsArgs {
    /// Folder with ARBITER_TOKEN, ZMQ_PUBLIC_KEY and DATABOX.pem, as a Databox mounts it
    #[arg(long, env = "EXPORT_SECRETS_DIR", default_value = "/run/secrets", value_parser = Trimmed(PathBufValueParser::new()))]
    secrets_dir: PathBuf,
    /// PEM file with certificate chain and key for HTTPS, instead of DATABOX.pem in the secrets folder
    #[arg(long, env = "EXPORT_TLS_PEM", value_name = "PEM", value_parser = Trimmed(OsStringValueParser::new()))]
    tls_pem: Option<OsString>,
}

impl TlsArgs {
    /// The PEM file; `None` means plain HTTP.
    pub fn pem(&self) -> Option<PathBuf> {
        let given = self.tls_pem.as_ref().filter(|path| !path.is_empty());
        let default = || {
            let path = self.secrets_dir.join("DATABOX.pem");
            // If it cannot be looked at, reading it gives the error: it must not become plain HTTP.
            path.try_exists().unwrap_or(true).then_some(path)
        };
        given.map(PathBuf::from).or_else(default)
    }

    fn identity(&self) -> Result<Option<Arc<Identity>>, ConfigError> {
        let Some(path) = self.pem() else {
            return Ok(None);
        };
        let shown = path.display().to_string();
        Identity::load(path)
            .map(|identity| Some(Arc::new(identity)))
            .map_err(|what| ConfigError(format!("the certificate file {shown} {what}")))
    }
}

/// The settings of `healthcheck`.
#[derive(Args)]
pub struct HealthcheckArgs {
    #[command(flatten)]
    listen: ListenArgs,
    #[command(flatten)]
    tls: TlsArgs,
}

impl HealthcheckArgs {
    /// The address to ask.
    pub fn address(&self) -> SocketAddr {
        self.listen.address()
    }

    /// Whether to ask over TLS.
    pub fn is_tls(&self) -> bool {
        self.tls.pem().is_some()
    }
}

/// What tokens are signed with, and which service they are for.
#[derive(Args)]
pub struct SecretArgs {
    /// This service's name, which tokens must have as their target
    #[arg(long, env = "DATABOX_LOCAL_NAME", default_value = "export-service", value_parser = Trimmed(StringValueParser::new()))]
    name: String,
    /// Secret that macaroons are signed with; the variable keeps it out of the process list
    #[arg(short, long, env = "EXPORT_SECRET", hide_env_values = true)]
    secret: Option<String>,
}

impl SecretArgs {
    /// The key derived from the secret, if one was given.
    fn key(&self) -> Result<Option<Key>, ConfigError> {
        match self.secret.as_deref() {
            Some("") => Err(ConfigError(
                "the macaroon secret is empty: give one with --secret or EXPORT_SECRET".into(),
            )),
            secret => Ok(secret.map(|secret| Key::derive(secret.as_bytes()))),
        }
    }
}

/// Where data may go.
#[derive(Args)]
pub struct DestinationArgs {
    /// Private network that exports may go to, also over plain HTTP, like 192.168.1.7/32; several with
    /// commas, or repeat the flag
    #[arg(long, env = "EXPORT_ALLOW_NETWORKS", value_name = "CIDR")]
    allow_network: Vec<String>,
    /// PEM file with more CA certificates to trust, like that of a server at home
    #[arg(long, env = "EXPORT_CA_FILE", value_name = "PEM", value_parser = Trimmed(OsStringValueParser::new()))]
    ca_file: Option<OsString>,
}

impl DestinationArgs {
    /// Which addresses a service on these ports may send to.
    ///
    /// # Errors
    /// A network that cannot be parsed.
    pub fn rules(&self, own_ports: Vec<u16>) -> Result<Rules, ConfigError> {
        let network = |text: &str| {
            values::network(text).map_err(|what| wrong_entry("--allow-network", text, &what))
        };
        let allowed = entries(&self.allow_network).map(network);
        let allowed = allowed.collect::<Result<_, _>>()?;
        Ok(Rules { allowed, own_ports })
    }

    /// Which certificates are trusted.
    ///
    /// # Errors
    /// A CA file that cannot be used.
    pub fn trust(&self) -> Result<Trust, ConfigError> {
        let given = self.ca_file.as_ref().filter(|path| !path.is_empty());
        let Some(path) = given.map(Path::new) else {
            return Trust::new(None).map_err(ConfigError);
        };
        let wrong = |what: String| ConfigError(format!("--ca-file {}: it {what}", path.display()));
        let pem = fs::read(path).map_err(|error| wrong(format!("cannot be read: {error}")))?;
        Trust::new(Some(&pem)).map_err(wrong)
    }
}

/// Where the owner's port is.
#[derive(Args)]
pub struct AdminArgs {
    /// Address and port for the owner, like 127.0.0.1:8081, which shows what left the box; without it, none
    #[arg(long, env = "EXPORT_ADMIN", value_name = "ADDR:PORT", value_parser = Trimmed(StringValueParser::new()))]
    admin: Option<String>,
}

impl AdminArgs {
    /// Where it is. None without one.
    ///
    /// # Errors
    /// It is not an address and a port.
    pub fn address(&self) -> Result<Option<SocketAddr>, ConfigError> {
        let given = self.admin.as_deref().filter(|text| !text.is_empty());
        let address = |text: &str| {
            values::socket_address(text).map_err(|what| wrong_entry("--admin", text, what))
        };
        given.map(address).transpose()
    }
}

/// Which data folder the service uses.
#[derive(Args)]
pub struct FolderArgs {
    /// Folder in which exports are stored until their results have expired
    #[arg(long, env = "EXPORT_DATA_DIR", default_value = "./data", value_parser = Trimmed(PathBufValueParser::new()))]
    pub data_dir: PathBuf,
}

/// The settings of `status`.
#[derive(Args)]
pub struct StatusArgs {
    #[command(flatten)]
    folder: FolderArgs,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

impl StatusArgs {
    /// The data folder of the service.
    pub fn folder(&self) -> &Path {
        &self.folder.data_dir
    }
}

/// The settings of `ledger`.
#[derive(Args)]
pub struct LedgerArgs {
    #[command(flatten)]
    folder: FolderArgs,
    /// Rows from this day or time on, like 2026-01-31, 2026-01-31T08:00:00Z, or how long ago, like 7d
    #[arg(
        long,
        value_name = "TIME",
        default_value = "",
        hide_default_value = true
    )]
    pub since: String,
    /// Rows before this day or time
    #[arg(
        long,
        value_name = "TIME",
        default_value = "",
        hide_default_value = true
    )]
    pub until: String,
    /// Rows of this sender: an identifier, an address or a label
    #[arg(long, default_value = "", hide_default_value = true)]
    pub who: String,
    /// Rows to this destination, like "hooks.example.com #3f9a", or a host alone
    #[arg(long, default_value = "", hide_default_value = true)]
    pub destination: String,
    /// Attempts without an answer of 200 to 299, and exports that were given up
    #[arg(long, conflicts_with = "refused")]
    pub failed: bool,
    /// Requests of apps that were refused
    #[arg(long)]
    pub refused: bool,
    /// Rows about the export with this id
    #[arg(long, default_value = "", hide_default_value = true)]
    pub id: String,
    /// Most rows to show, the newest; 50 if not given
    #[arg(long, value_name = "ROWS", value_parser = values::count::<u64>)]
    pub limit: Option<u64>,
    /// Print one JSON object for each row
    #[arg(long, conflicts_with = "csv")]
    pub json: bool,
    /// Print CSV
    #[arg(long)]
    pub csv: bool,
    /// Print sums instead: by day, week, who or destination
    #[arg(long, value_name = "BY", num_args = 0..=1, require_equals = true, default_missing_value = "day", value_parser = ["day", "week", "who", "destination"],
        conflicts_with_all = ["who", "destination", "failed", "refused", "id", "limit", "csv"])]
    pub summary: Option<String>,
    /// Go on with rows as they are written
    #[arg(long, conflicts_with_all = ["summary", "verify"])]
    pub follow: bool,
    /// Print the last row's number and the hash of all rows up to it; with --verify, check that such a head that
    /// was noted earlier still belongs to the ledger
    #[arg(long, value_name = "SEQ:HASH", num_args = 0..=1, default_missing_value = "")]
    pub head: Option<String>,
    /// Check that no row was changed, removed or moved; exit 0 if whole, 1 if broken, 3 if the noted head is older
    /// than what is kept
    #[arg(long)]
    pub verify: bool,
}

impl LedgerArgs {
    /// The data folder of the service.
    pub fn folder(&self) -> &Path {
        &self.folder.data_dir
    }
}

/// The settings of `pause`.
#[derive(Args)]
pub struct PauseArgs {
    /// What to hold: all, a destination (a URL, a name like `a.example #3f9a`, a host) or an app
    #[arg(default_value = "all")]
    pub subject: String,
    /// How long, like 2h; without it, until you resume
    #[arg(long, value_name = "TIME")]
    pub r#for: Option<String>,
    #[command(flatten)]
    folder: FolderArgs,
}

/// The settings of `resume`.
#[derive(Args)]
pub struct ResumeArgs {
    /// What was paused, as status shows it
    #[arg(default_value = "all")]
    pub subject: String,
    #[command(flatten)]
    folder: FolderArgs,
}

/// The settings of `retry` and `cancel`.
#[derive(Args)]
pub struct TargetArgs {
    /// An export's id, a destination (a URL, a name like `a.example #3f9a`, a host) or an app
    #[arg(value_name = "ID|DESTINATION")]
    pub target: String,
    #[command(flatten)]
    folder: FolderArgs,
}

/// The settings of `forget`.
#[derive(Args)]
pub struct ForgetArgs {
    /// An app, or a destination (a URL, a name like `a.example #3f9a`, a host)
    #[arg(value_name = "APP|DESTINATION")]
    pub subject: String,
    #[command(flatten)]
    folder: FolderArgs,
}

/// The settings of `label`.
#[derive(Args)]
pub struct LabelArgs {
    /// The app, as status shows it: its address or its token's identifier
    pub who: String,
    /// Its new name; empty to take that away
    pub label: String,
    #[command(flatten)]
    folder: FolderArgs,
}

/// The settings of `seen`.
#[derive(Args)]
pub struct SeenArgs {
    /// A URL, a name like `a.example #3f9a`, or a host
    pub destination: String,
    #[command(flatten)]
    folder: FolderArgs,
}

/// The settings of `show`.
#[derive(Args)]
pub struct ExportArgs {
    /// The export's id
    pub id: String,
    #[command(flatten)]
    folder: FolderArgs,
}

/// Every command about a running service is told its data folder in the same way.
macro_rules! in_folder {
    ($($arguments:ty),*) => {
        $(impl $arguments {
            /// The data folder of the service.
            pub fn folder(&self) -> &Path {
                &self.folder.data_dir
            }
        })*
    };
}

in_folder!(
    PauseArgs, ResumeArgs, TargetArgs, ForgetArgs, LabelArgs, SeenArgs, ExportArgs
);

/// The settings of `link`.
#[derive(Args)]
pub struct LinkArgs {
    #[command(flatten)]
    folder: FolderArgs,
    /// Make a token that can look at everything and change nothing
    #[arg(long)]
    pub read_only: bool,
    /// Make a token for GET /metrics only, for Prometheus
    #[arg(long)]
    pub metrics: bool,
    /// How long the token is good for, like 1h; without it, forever
    #[arg(long, value_parser = values::duration)]
    pub expires: Option<Duration>,
}

impl LinkArgs {
    /// The data folder of the service.
    pub fn folder(&self) -> &Path {
        &self.folder.data_dir
    }
}

/// The settings of `serve`.
#[derive(Args)]
pub struct ServeArgs {
    /// Check the settings, print those in force, and exit: with 0 if they can work, else 2
    #[arg(long)]
    pub check: bool,
    #[command(flatten)]
    listen: ListenArgs,
    #[command(flatten)]
    tls: TlsArgs,
    #[command(flatten)]
    secret: SecretArgs,
    /// Where a Databox's arbiter listens; it is asked for the secret if none is given
    #[arg(
        long,
        env = "DATABOX_ARBITER_ENDPOINT",
        default_value = "tcp://arbiter:4444",
        value_parser = Trimmed(StringValueParser::new()),
        value_name = "ENDPOINT"
    )]
    arbiter: String,
    #[command(flatten)]
    folder: FolderArgs,
    /// Keep exports in memory only: all are lost when the service ends
    #[arg(long, env = "EXPORT_EPHEMERAL", value_parser = Trimmed(values::switch))]
    ephemeral: bool,
    /// Threads that serve requests, 1 to 256
    #[arg(long, env = "EXPORT_THREADS", default_value_t = 8, value_parser = Trimmed(values::count::<usize>))]
    threads: usize,
    /// Most connections at a time
    #[arg(long, env = "EXPORT_MAX_CONNECTIONS", default_value_t = 512, value_parser = Trimmed(values::count::<usize>))]
    max_connections: usize,
    /// Most connections at a time from one client address; all apps behind a port mapping share one
    #[arg(long, env = "EXPORT_MAX_CONNECTIONS_PER_PEER", default_value_t = 256, value_parser = Trimmed(values::count::<usize>))]
    max_connections_per_peer: usize,
    /// How long a result can be read after the export is finished, like 90s, 15m, 24h or 7d
    #[arg(long, env = "EXPORT_RETENTION", default_value = "24h", value_parser = Trimmed(values::duration))]
    retention: Duration,
    /// Largest request body, in bytes or like 64KiB or 1M
    #[arg(long, env = "EXPORT_MAX_BODY", value_name = "BYTES", default_value = "1MiB", value_parser = Trimmed(values::size::<usize>))]
    max_body: usize,
    /// Most unfinished exports in one queue: those of one token identifier, or one client address if that is
    /// empty, to one destination
    #[arg(long, env = "EXPORT_MAX_PENDING", default_value_t = 10_000, value_parser = Trimmed(values::count::<usize>))]
    max_pending: usize,
    /// Most bytes that all exports and results together may take on disk, like 256M
    #[arg(long, env = "EXPORT_MAX_STORE", value_name = "BYTES", default_value = "256MiB", value_parser = Trimmed(values::size::<u64>))]
    max_store: u64,
    /// How long the ledger keeps each attempt, like 90d; its sums by day are kept for good
    #[arg(long, env = "EXPORT_LEDGER_RETENTION", default_value = "90d", value_parser = Trimmed(values::duration))]
    ledger_retention: Duration,
    /// Most bytes that the ledger may take on disk, beside --max-store, like 64M
    #[arg(long, env = "EXPORT_LEDGER_SIZE", value_name = "BYTES", default_value = "64MiB", value_parser = Trimmed(values::size::<u64>))]
    ledger_size: u64,
    #[command(flatten)]
    destinations: DestinationArgs,
    /// Response statuses that count as failed attempts, like 429,503 or 5xx
    #[arg(long, env = "EXPORT_RETRY_ON", value_name = "STATUS,…")]
    retry_on: Vec<String>,
    /// How long an export is retried while its queue delivers nothing; time in which the service is off
    /// does not count
    #[arg(long, env = "EXPORT_GIVE_UP_AFTER", default_value = "24h", value_parser = Trimmed(values::duration))]
    give_up_after: Duration,
    /// How long one attempt may take, including the response's body
    #[arg(long, env = "EXPORT_ATTEMPT_TIMEOUT", default_value = "30s", value_parser = Trimmed(values::duration))]
    attempt_timeout: Duration,
    /// Most attempts at a time, so that one that hangs does not hold up the others; 1 for one after another
    #[arg(long, env = "EXPORT_MAX_CONCURRENT_ATTEMPTS", default_value_t = 64, value_parser = Trimmed(values::count::<usize>))]
    max_concurrent_attempts: usize,
    /// The former setting for --max-concurrent-attempts, less one
    #[arg(long, env = "EXPORT_MAX_RELIEVED", hide = true, value_parser = Trimmed(values::count::<usize>))]
    max_relieved: Option<usize>,
    /// Secret to sign exports with: whsec_ and base64, as in Standard Webhooks
    #[arg(long, env = "EXPORT_SIGNING_SECRET", hide_env_values = true)]
    signing_secret: Option<String>,
    /// Largest response body that is kept, in bytes or like 64KiB or 1M; the rest is cut off
    #[arg(long, env = "EXPORT_MAX_RESPONSE", value_name = "BYTES", default_value = "1MiB", value_parser = Trimmed(values::size::<usize>))]
    max_response: usize,
    #[command(flatten)]
    admin: AdminArgs,
    /// Name by which the owner's port may be addressed, beside localhost, --name and IP addresses; several
    /// with commas, or repeat the flag
    #[arg(long, env = "EXPORT_ADMIN_HOST", value_name = "NAME")]
    admin_host: Vec<String>,
    /// Format of log lines
    #[arg(long, env = "EXPORT_LOG_FORMAT", default_value = "text", value_parser = Trimmed(value_parser!(Format)))]
    log_format: Format,
    /// Log more: -v for each poll, -vv for each step
    #[arg(short, long, action = ArgAction::Count)]
    verbose: u8,
    /// Log less: -q for what went wrong, -qq for what needs someone to act
    #[arg(short, long, action = ArgAction::Count, conflicts_with = "verbose")]
    quiet: u8,
}

/// The settings of `token`.
#[derive(Args)]
pub struct TokenArgs {
    #[command(flatten)]
    secret: SecretArgs,
    /// Say what a token is good for instead: this one, or the one on standard input, which keeps it out of
    /// the process list
    #[arg(long, value_name = "TOKEN", num_args = 0..=1, default_missing_value = "",
        conflicts_with_all = ["destination", "path", "method", "id", "expires"])]
    pub show: Option<String>,
    /// URL that the token allows exports to, exactly
    #[arg(long, required_unless_present = "show")]
    destination: Option<String>,
    /// Path that the token is good for; a trailing * matches any rest
    #[arg(long, default_value = "/lp/export")]
    pub path: String,
    /// HTTP method that the token is good for; exports take no other
    #[arg(long, default_value = "POST")]
    pub method: String,
    /// Identifier of the token's holder; a Databox's arbiter leaves it empty
    #[arg(long, default_value = "")]
    pub id: String,
    /// How long the token is good for, like 1h; without it, forever
    #[arg(long, value_parser = values::duration)]
    pub expires: Option<Duration>,
}

impl TokenArgs {
    /// The URL to mint for; empty if nothing is to be minted.
    pub fn destination(&self) -> &str {
        self.destination.as_deref().unwrap_or_default()
    }

    /// This service's name, and the root key of its tokens if a secret was given.
    ///
    /// # Errors
    /// An empty secret.
    pub fn issuer(&self) -> Result<(&str, Option<Key>), ConfigError> {
        Ok((&self.secret.name, self.secret.key()?))
    }

    /// The name and the root key to mint for.
    ///
    /// # Errors
    /// No secret, or an empty one.
    pub fn signer(&self) -> Result<(&str, Key), ConfigError> {
        let key = self.secret.key()?.ok_or_else(|| {
            ConfigError(
                "there is no macaroon secret: give one with --secret or EXPORT_SECRET".into(),
            )
        })?;
        Ok((&self.secret.name, key))
    }
}

/// The settings of `sink`.
#[derive(Args)]
pub struct SinkArgs {
    /// Port to listen on; 0 lets the system choose one
    #[arg(long, default_value_t = 9090, value_parser = values::port)]
    pub port: u16,
    /// Status to answer with
    #[arg(long, default_value_t = 200, value_parser = values::final_status)]
    pub status: u16,
    /// How long to wait before each answer, like 200ms
    #[arg(long, default_value = "0s", value_parser = values::duration)]
    pub delay: Duration,
}

/// The settings of `check`.
#[derive(Args)]
pub struct CheckArgs {
    /// URL to check
    pub url: String,
    /// Token of an app: check whether it allows exports to the URL, too; the variable keeps it out of the
    /// process list
    #[arg(long, env = "EXPORT_TOKEN", hide_env_values = true, value_parser = Trimmed(StringValueParser::new()))]
    pub token: Option<String>,
    #[command(flatten)]
    secret: SecretArgs,
    #[command(flatten)]
    pub(crate) destinations: DestinationArgs,
    /// Port of the service itself, which is never a destination
    #[arg(long, env = "DATABOX_LOCAL_PORT", default_value_t = 8080, value_parser = Trimmed(values::port))]
    port: u16,
    #[command(flatten)]
    admin: AdminArgs,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

impl CheckArgs {
    /// This service's name, and the root key of its tokens if a secret was given.
    ///
    /// # Errors
    /// An empty secret.
    pub fn issuer(&self) -> Result<(&str, Option<Key>), ConfigError> {
        Ok((&self.secret.name, self.secret.key()?))
    }

    /// Which addresses the service may send to.
    ///
    /// # Errors
    /// A network or an address that cannot be parsed.
    pub fn rules(&self) -> Result<Rules, ConfigError> {
        let admin = self.admin.address()?;
        let ports = admin.map(|admin| admin.port());
        let ports = ports.into_iter().chain([self.port]);
        self.destinations.rules(ports.collect())
    }
}

impl ServeArgs {
    /// Checks everything that can be checked before the service starts, and reads the files that the
    /// settings name. Blocks on those files.
    ///
    /// # Errors
    /// The first setting that cannot work.
    pub fn check(self) -> Result<Config, ConfigError> {
        within("--threads", self.threads, 1, 256)?;
        within("--max-connections", self.max_connections, 1, 65_536)?;
        within(
            "--max-connections-per-peer",
            self.max_connections_per_peer,
            1,
            65_536,
        )?;
        within("--max-body", self.max_body, 1024, 64 * 1024 * 1024)?;
        within("--max-pending", self.max_pending, 1, usize::MAX)?;
        for (flag, size) in [
            ("--max-store", self.max_store),
            ("--ledger-size", self.ledger_size),
        ] {
            if size < LEAST_STORE {
                return Err(ConfigError(format!(
                    "{flag} is {size}: it must be at least {LEAST_STORE}"
                )));
            }
        }
        within("--max-response", self.max_response, 0, 16 * 1024 * 1024)?;
        if self.retention.is_zero() {
            return Err(ConfigError(
                "--retention is 0, so nobody could ever read a result: give some time, like 1h"
                    .into(),
            ));
        }
        let max_concurrent_attempts = match self.max_relieved {
            Some(relieved) => {
                within("--max-relieved", relieved, 0, 1023)?;
                relieved + 1
            }
            None => self.max_concurrent_attempts,
        };
        within(
            "--max-concurrent-attempts",
            max_concurrent_attempts,
            1,
            1024,
        )?;
        let mut retry_on = Vec::new();
        for text in entries(&self.retry_on) {
            let meant = values::statuses(text);
            retry_on.extend(meant.map_err(|what| wrong_entry("--retry-on", text, what))?);
        }
        for (flag, value) in [
            ("--give-up-after", self.give_up_after),
            ("--attempt-timeout", self.attempt_timeout),
        ] {
            if value < Duration::from_millis(100) {
                return Err(ConfigError(format!(
                    "{flag} is {}, too short for any attempt: give some time, like 30s",
                    humantime::format_duration(value)
                )));
            }
        }
        if self.attempt_timeout > LONGEST_ATTEMPT {
            return Err(ConfigError(format!(
                "--attempt-timeout is {}: it must be at most {}",
                humantime::format_duration(self.attempt_timeout),
                humantime::format_duration(LONGEST_ATTEMPT)
            )));
        }
        let signing_key = match self
            .signing_secret
            .as_deref()
            .filter(|text| !text.is_empty())
            .map(SigningKey::read)
        {
            Some(None) => {
                return Err(ConfigError(
                    "--signing-secret cannot be used: it must be whsec_ and base64 of 24 to 64 bytes"
                        .into(),
                ));
            }
            key => key.flatten(),
        };
        if self.secret.name.trim().is_empty() {
            return Err(ConfigError(
                "--name is empty: give the name that tokens have as target".into(),
            ));
        }
        let level = i16::from(self.verbose) - i16::from(self.quiet);
        let rules = self.destinations.rules(vec![self.listen.port])?;
        let admin = self.admin.address()?;
        if admin.is_some() && self.ephemeral {
            return Err(ConfigError(
                "--admin needs a data folder, in which the key for the owner's tokens is kept: leave \
                 --ephemeral out"
                    .into(),
            ));
        }
        if let Some(admin) = admin.filter(|admin| admin.port() == self.listen.port)
            && self.listen.port != 0
            && (admin.ip() == self.listen.bind
                || admin.ip().is_unspecified()
                || self.listen.bind.is_unspecified())
        {
            return Err(ConfigError(format!(
                "--admin {admin}: this is the port of the programs, --port: give the owner another"
            )));
        }
        let hosts = entries(&self.admin_host).map(admin_host);
        let hosts = hosts.collect::<Result<Vec<_>, _>>()?;
        let admin_hosts = Hosts::new(hosts, self.secret.name.clone());
        let identity = self.tls.identity()?;
        let secret = self.secret.secret.as_deref();
        let warnings = warnings::of(self.listen.bind, identity.is_some(), &rules.allowed, secret);
        Ok(Config {
            address: self.listen.address(),
            secret: match self.secret.key()? {
                Some(key) => SecretSource::Given(key),
                None => SecretSource::Arbiter(self.arbiter()?),
            },
            name: self.secret.name,
            place: if self.ephemeral {
                Place::Memory
            } else {
                Place::Folder(self.folder.data_dir)
            },
            threads: self.threads,
            connections: gate::Settings {
                limits: gate::Limits {
                    connections: self.max_connections,
                    per_client: self.max_connections_per_peer,
                },
                memory: LARGE_REQUESTS.max(2 * self.max_body),
                max_body: self.max_body,
                identity,
            },
            limits: Limits {
                max_pending: self.max_pending,
                max_store: self.max_store,
                retention: self.retention,
                give_up_after: self.give_up_after,
                ledger: LedgerLimits {
                    size: self.ledger_size,
                    retention: i64::try_from(self.ledger_retention.as_millis()).unwrap_or(i64::MAX),
                },
            },
            worker: worker::Settings {
                retry_on,
                plain_allowed: !rules.allowed.is_empty(),
                max_concurrent_attempts,
            },
            attempts: attempt::Settings {
                timeout: self.attempt_timeout,
                max_response: self.max_response,
                rules,
                trust: self.destinations.trust()?,
                signing_key,
            },
            admin,
            admin_hosts,
            warnings,
            // No setting of a person's, so without a flag.
            notify_socket: env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty()),
            log_format: self.log_format,
            log_level: match level {
                ..=-2 => LevelFilter::Error,
                -1 => LevelFilter::Warn,
                0 => LevelFilter::Info,
                1 => LevelFilter::Debug,
                2.. => LevelFilter::Trace,
            },
        })
    }

    /// How to ask the arbiter, if no secret was given.
    fn arbiter(&self) -> Result<arbiter::Settings, ConfigError> {
        let token = self.secret_file(ARBITER_TOKEN)?;
        let text = self.secret_file(ZMQ_PUBLIC_KEY)?;
        let server_key = str::from_utf8(&text)
            .ok()
            .and_then(|text| curve::key_of_z85(text.trim()))
            .ok_or_else(|| {
                ConfigError(format!(
                    "{} is not a Z85 key, which has 40 characters: put the arbiter's there, or \
                     give the macaroon secret itself with --secret or EXPORT_SECRET",
                    self.tls.secrets_dir.join(ZMQ_PUBLIC_KEY).display()
                ))
            })?;
        let endpoint: Endpoint = self.arbiter.parse().map_err(|()| {
            ConfigError(format!(
                "--arbiter {}: give the arbiter's address like tcp://arbiter:4444",
                self.arbiter.escape_debug()
            ))
        })?;
        arbiter::Settings::new(endpoint, server_key, &token, &self.secret.name).ok_or_else(|| {
            ConfigError("--name is too long: the arbiter takes no name of over 65535 bytes".into())
        })
    }

    /// The content of a file in the secrets folder, without one line end.
    fn secret_file(&self, name: &str) -> Result<Vec<u8>, ConfigError> {
        let path = self.tls.secrets_dir.join(name);
        let mut content = Vec::new();
        let read = File::open(&path)
            .and_then(|file| file.take(LONGEST_FILE + 1).read_to_end(&mut content))
            .and_then(|length| {
                // One line end comes from an editor; anything else may belong to the token.
                content.pop_if(|last| *last == b'\n');
                match length as u64 {
                    _ if content.is_empty() => Err(io::Error::other("it is empty")),
                    0..=LONGEST_FILE => Ok(content),
                    _ => Err(io::Error::other("it is too long")),
                }
            });
        read.map_err(|error| {
            ConfigError(format!(
                "there is no macaroon secret, and no arbiter can be asked for it: {name} cannot be \
                 read from {}: {error}; give the secret with --secret or EXPORT_SECRET, or on a \
                 Databox the folder of its files with --secrets-dir",
                path.display()
            ))
        })
    }
}

/// A name for the owner's port, without a port of its own.
fn admin_host(name: &str) -> Result<String, ConfigError> {
    let is_name = name
        .bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte));
    match is_name {
        true => Ok(name.trim_end_matches('.').to_owned()),
        false => Err(ConfigError(format!(
            "--admin-host {}: give a name alone, like box.lan, without scheme and port",
            name.escape_debug()
        ))),
    }
}

/// The error for a value, or an entry of a list, that is not what it must be.
fn wrong_entry(flag: &str, text: &str, what: &str) -> ConfigError {
    ConfigError(format!("{flag} {}: {what}", text.escape_debug()))
}

fn within(flag: &str, value: usize, least: usize, most: usize) -> Result<(), ConfigError> {
    if (least..=most).contains(&value) {
        return Ok(());
    }
    Err(ConfigError(format!(
        "{flag} is {value}: it must be from {least} to {most}"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ipnet::IpNet;

    fn checked(arguments: &[&str]) -> Result<Config, ConfigError> {
        let arguments = ["export-service", "--secret", "s3cret"]
            .iter()
            .chain(arguments);
        Cli::try_parse_from(arguments).ok().unwrap().serve.check()
    }

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn settings_out_of_range_are_named_with_their_value() {
        for (arguments, expected) in [
            (
                ["--threads", "0"],
                "--threads is 0: it must be from 1 to 256",
            ),
            (
                ["--max-body", "10"],
                "--max-body is 10: it must be from 1024 to 67108864",
            ),
        ] {
            assert_eq!(checked(&arguments).err().unwrap().to_string(), expected);
        }
        assert!(checked(&["--retention", "0s"]).is_err());
        assert!(checked(&["--name", ""]).is_err());
        let empty = Cli::try_parse_from(["export-service", "--secret="])
            .ok()
            .unwrap();
        assert!(empty.serve.check().is_err());
    }

    #[test]
    fn debug_output_does_not_show_the_secret() {
        let config = checked(&[]).unwrap();
        assert!(!format!("{config:?}").contains("s3cret"));
    }

    #[test]
    fn lists_are_separated_by_commas_and_any_blanks_and_empty_entries_are_skipped() {
        let networks = ["192.168.1.0/24", "10.0.0.5/32", "fd00::/8"];
        for list in [
            "192.168.1.0/24,10.0.0.5,fd00::/8",
            "192.168.1.0/24, 10.0.0.5 ,fd00::/8",
            " 192.168.1.0/24\t,\t10.0.0.5,\n  fd00::/8\n",
            "192.168.1.0/24 10.0.0.5\nfd00::/8",
            ",192.168.1.0/24,, ,10.0.0.5,fd00::/8,",
            "192.168.1.0/24,\r\n10.0.0.5,\u{a0}fd00::/8,\r\n",
        ] {
            let config = checked(&["--allow-network", list]).unwrap();
            let allowed = config.attempts.rules.allowed.iter();
            assert_eq!(allowed.map(IpNet::to_string).collect::<Vec<_>>(), networks);
            let statuses = list.replace("192.168.1.0/24", "503");
            let statuses = statuses
                .replace("10.0.0.5", "429")
                .replace("fd00::/8", "301");
            let config = checked(&["--retry-on", &statuses]).unwrap();
            assert_eq!(config.worker.retry_on, [503, 429, 301], "{statuses:?}");
        }
        let repeated = [
            "--allow-network",
            "10.0.0.1 ",
            "--allow-network",
            "10.0.0.2,",
        ];
        let config = checked(&repeated).unwrap();
        assert_eq!(config.attempts.rules.allowed.len(), 2);
        for nothing in ["", ",", " , \n"] {
            let config = checked(&["--allow-network", nothing, "--retry-on", nothing]).unwrap();
            assert!(config.attempts.rules.allowed.is_empty() && config.worker.retry_on.is_empty());
        }
    }

    #[test]
    fn a_wrong_entry_of_a_list_is_shown_as_it_was_given() {
        for (flag, list, shown) in [
            (
                "--allow-network",
                "10.0.0.0/8, 192.168.1.0/99 ,::1",
                "--allow-network 192.168.1.0/99:",
            ),
            (
                "--allow-network",
                "10.0.0.0/8,192.168.1.7/24",
                "--allow-network 192.168.1.7/24: give 192.168.1.0/24 for the whole network, or 192.168.1.7/32 \
                 for that address alone",
            ),
            (
                "--admin",
                "8081",
                "--admin 8081: give an IP address and a port",
            ),
            (
                "--allow-network",
                "10.0.0.0/8;::1",
                "--allow-network 10.0.0.0/8;::1:",
            ),
            (
                "--allow-network",
                "10.0.0.1\u{200b}",
                "--allow-network 10.0.0.1\\u{200b}:",
            ),
            (
                "--admin",
                "127.0.0.1:8080",
                "--admin 127.0.0.1:8080: this is the port of the programs",
            ),
            ("--retry-on", "503, 4 ", "--retry-on 4:"),
            ("--retry-on", "503,0429,5x", "--retry-on 5x:"),
            ("--retry-on", "503,2xx", "--retry-on 2xx:"),
            ("--retry-on", "99999999", "--retry-on 99999999:"),
            ("--give-up-after", "50ms", "--give-up-after is 50ms"),
            (
                "--attempt-timeout",
                "18446744073709551615s",
                "--attempt-timeout is 584542046090years",
            ),
            ("--name", " ", "--name is empty"),
        ] {
            let message = checked(&[flag, list]).err().unwrap().to_string();
            assert!(message.starts_with(shown), "{message}");
        }
    }

    #[test]
    fn blanks_around_a_value_are_ignored_except_in_secrets() {
        let config = checked(&[
            "--port=\t8081 ",
            "--bind= 127.0.0.1\n",
            "--name= me ",
            "--data-dir=/tmp/x \n",
            "--threads= 3",
            "--max-store= 300000 ",
            "--retention= 2h ",
            "--log-format= json ",
        ])
        .unwrap();
        assert_eq!(config.address.to_string(), "127.0.0.1:8081");
        assert_eq!((config.name.as_str(), config.threads), ("me", 3));
        assert_eq!(config.place.folder(), Some(Path::new("/tmp/x")));
        assert_eq!(config.limits.max_store, 300_000);
        assert_eq!(config.limits.retention, Duration::from_secs(7200));
        assert_eq!(config.log_format, Format::Json);
        let secret = |text: &str| {
            let arguments = ["export-service", "--secret", text];
            let config = Cli::try_parse_from(arguments).ok().unwrap().serve.check();
            match config.unwrap().secret {
                SecretSource::Given(key) => key,
                SecretSource::Arbiter(_) => panic!("no secret"),
            }
        };
        let signed = |key: Key| crate::auth::Macaroon::mint(&key, "", []).to_v1();
        assert_ne!(signed(secret("s")), signed(secret("s ")));
    }

    #[test]
    fn sizes_and_statuses_are_set_as_people_write_them() {
        let config = checked(&[
            "--max-body=64KiB",
            "--max-store= 1M ",
            "--ledger-size=1MB",
            "--max-response=0",
            "--retry-on=429,5xx",
            "--admin=localhost:81",
        ])
        .unwrap();
        assert_eq!(config.connections.max_body, 65_536);
        assert_eq!(
            (config.limits.max_store, config.limits.ledger.size),
            (1 << 20, 1_000_000)
        );
        assert_eq!(config.attempts.max_response, 0);
        let statuses: Vec<_> = std::iter::once(429).chain(500..=599).collect();
        assert_eq!(config.worker.retry_on, statuses);
        assert_eq!(config.admin, Some("127.0.0.1:81".parse().unwrap()));
        let defaults = checked(&[]).unwrap();
        assert_eq!(defaults.limits.max_store, 256 * 1024 * 1024);
        assert_eq!(defaults.limits.ledger.size, 64 * 1024 * 1024);
        assert_eq!(
            (
                defaults.connections.max_body,
                defaults.attempts.max_response
            ),
            (1 << 20, 1 << 20)
        );
    }

    #[test]
    fn verbose_and_quiet_move_the_log_level_both_ways() {
        let level = |arguments: &[&str]| checked(arguments).unwrap().log_level;
        assert_eq!(level(&[]), LevelFilter::Info);
        assert_eq!(level(&["-vv"]), LevelFilter::Trace);
        assert_eq!(level(&["-q"]), LevelFilter::Warn);
        assert_eq!(level(&["-qqq"]), LevelFilter::Error);
    }
}
