//! Arguments, the order of start and stop, signals, exit codes.

use std::env;
use std::io::{self, Write};
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::{self, ExitCode};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use clap::{CommandFactory, FromArgMatches};
use crossbeam_channel::{Receiver, bounded};
use export_service::auth::secret::Secret;
use export_service::config::usage::{explain, with_source};
use export_service::config::warnings::Warning;
use export_service::config::{Cli, Command, Config, SecretSource, variables};
use export_service::delivery::attempt::Client;
use export_service::delivery::worker;
use export_service::exports::Exports;
use export_service::exports::store::{Place, Store};
use export_service::gate::tls::Identity;
use export_service::gate::{Gate, Serve};
use export_service::key_file::Key;
use export_service::ledger::{KEY_FILE, LedgerKey};
use export_service::metrics::Metrics;
use export_service::owner::Owner;
use export_service::routes::Policy;
use export_service::server::{Server, Service};
use export_service::tools::ledger::{self, Failure};
use export_service::tools::{acts, check, healthcheck, link, settings, sink, status, token};
use export_service::waits::Waits;
use export_service::{arbiter, logging, systemd, threads};
use parking_lot::Mutex;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// How long after the signal to stop connections may still exist: parked polls and submissions are
/// answered, and clients read their answers.
const LAST_ANSWERS: Duration = Duration::from_secs(3);
/// How long after the signal attempts under way may go on.
const LAST_ATTEMPT: Duration = Duration::from_secs(5);
/// How long after both the last commit may take. That makes seven seconds in all; Docker kills after ten.
const LAST_COMMIT: Duration = Duration::from_secs(2);

/// The exit code for settings that cannot work, which clap uses too.
const EXIT_USAGE: u8 = 2;
/// The exit code of `ledger` if it cannot read it.
const EXIT_UNREADABLE: u8 = 4;
/// The exit code after a second signal is this plus its number, as in shells.
const EXIT_SIGNAL: i32 = 128;

fn main() -> ExitCode {
    let mut usage = Cli::command();
    let parsed = usage
        .try_get_matches_from_mut(env::args_os())
        .and_then(|matches| Ok((Cli::from_arg_matches(&matches)?, matches)));
    let (cli, matches) = match parsed {
        Ok(parsed) => parsed,
        Err(error) if error.use_stderr() => return refuse(&usage, &explain(&error)),
        // Help or the version, as asked for.
        Err(help) => help.exit(),
    };
    let command = cli
        .command
        .unwrap_or_else(|| Command::Serve(Box::new(cli.serve)));
    let unknown = match &command {
        Command::Serve(_) | Command::Token(_) | Command::Check(_) => unknown_variables(&usage),
        // The others have hardly any settings, and may run every minute.
        _ => None,
    };
    // A service that starts has a log for it.
    if !matches!(&command, Command::Serve(arguments) if !arguments.check) {
        warn(&unknown);
    }
    let done = match command {
        Command::Serve(arguments) if arguments.check => match arguments.check() {
            Ok(config) => {
                warn(&config.warnings);
                let (usage, matches) = match matches.subcommand() {
                    Some((name, matches)) => (usage.find_subcommand(name), matches),
                    None => (Some(&usage), &matches),
                };
                let settings = usage.map(|usage| settings::settings(usage, matches, &config));
                let settings = settings.unwrap_or_default();
                write!(io::stdout(), "{settings}").map_err(|error| error.to_string())
            }
            Err(error) => return refuse(&usage, &error.to_string()),
        },
        Command::Serve(arguments) => match arguments.check() {
            Ok(mut config) => {
                config.warnings.extend(unknown);
                // All commands with their help take a quarter of a megabyte, which is of no use from here on.
                drop((usage, matches));
                serve(config)
            }
            Err(error) => {
                // It may be why.
                warn(&unknown);
                return refuse(&usage, &error.to_string());
            }
        },
        Command::Token(arguments) => match token::token(&arguments, SystemTime::now()) {
            Ok(token) => writeln!(io::stdout(), "{token}").map_err(|error| error.to_string()),
            Err(error) => return fail(&error, EXIT_USAGE),
        },
        Command::Sink(arguments) => sink::sink(&arguments).map_err(|error| {
            format!(
                "cannot be a sink on port {}: {error}; choose another with --port",
                arguments.port
            )
        }),
        Command::Check(arguments) => match check::check(&arguments) {
            Ok(true) => Ok(()),
            Ok(false) => return ExitCode::FAILURE,
            Err(error) => return refuse(&usage, &error),
        },
        Command::Healthcheck(arguments) => healthcheck::healthcheck(&arguments),
        Command::Status(arguments) => match status::status(&arguments) {
            Ok(true) => Ok(()),
            Ok(false) => return ExitCode::FAILURE,
            Err(error) => Err(error),
        },
        Command::Ledger(arguments) => match ledger::ledger(&arguments, SystemTime::now()) {
            Ok(code) => return ExitCode::from(code),
            Err(Failure::Usage(error)) => return fail(&error, EXIT_USAGE),
            // Not 1, which says that the chain is broken.
            Err(Failure::Failed(error)) => return fail(&error, EXIT_UNREADABLE),
        },
        Command::Pause(arguments) => return acted(acts::pause(&arguments)),
        Command::Resume(arguments) => return acted(acts::resume(&arguments)),
        Command::Retry(arguments) => return acted(acts::retry(&arguments)),
        Command::Cancel(arguments) => return acted(acts::cancel(&arguments)),
        Command::Forget(arguments) => return acted(acts::forget(&arguments)),
        Command::Label(arguments) => return acted(acts::label(&arguments)),
        Command::Seen(arguments) => return acted(acts::seen(&arguments)),
        Command::Show(arguments) => return acted(acts::show(&arguments)),
        Command::Link(arguments) => match link::link(&arguments, SystemTime::now()) {
            Ok(()) => Ok(()),
            Err(error) => return fail(&error, EXIT_USAGE),
        },
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error, 1),
    }
}

fn acted(done: Result<(), acts::Failed>) -> ExitCode {
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(acts::Failed::Refused(why)) => fail(&why, 1),
        Err(acts::Failed::Usage(why)) => fail(&why, EXIT_USAGE),
    }
}

fn fail(message: &str, code: u8) -> ExitCode {
    logging::flush();
    logging::print(format!("export-service: {message}\n"));
    ExitCode::from(code)
}

/// Ends because of a setting.
fn refuse(usage: &clap::Command, message: &str) -> ExitCode {
    let arguments: Vec<_> = env::args_os().collect();
    let has = |name: &str| env::var_os(name).is_some();
    fail(&with_source(message, usage, &arguments, has), EXIT_USAGE)
}

/// Variables that look like settings, which would be ignored without a word.
fn unknown_variables(usage: &clap::Command) -> Option<Warning> {
    let names = env::vars_os().map(|(name, _)| name);
    let setting = variables::unknown(usage, names)?;
    let what = "unknown variables are ignored";
    Some(Warning { what, setting })
}

fn warn<'a>(warnings: impl IntoIterator<Item = &'a Warning>) {
    for warning in warnings {
        logging::print(format!("export-service: warning: {warning}\n"));
    }
}

/// Starts everything from the disk outwards, so that it is complete at the first request. On a signal, stops
/// it from the network inwards, so that no request that was taken is left unanswered.
fn serve(mut config: Config) -> Result<(), String> {
    let metrics = Arc::new(Metrics::default());
    logging::start(config.log_format, config.log_level, metrics.clone());
    threads::exit_on_panic(logging::flush);
    for Warning { what, setting } in &config.warnings {
        log::warn!(setting = setting.as_str(); "{what}");
    }
    let stop = signals(config.connections.identity.clone())
        .map_err(|error| format!("cannot listen for signals: {error}"))?;
    let listener = TcpListener::bind(config.address).map_err(|error| {
        format!(
            "cannot listen on {}: {error}; choose another --port or --bind, or stop what uses it",
            config.address
        )
    })?;
    let address = listener.local_addr().map_err(|error| error.to_string())?;
    let admin = config.admin.map(bind_admin).transpose()?;
    let admin_address = admin.as_ref().map(|(_, address)| *address);

    let notify_socket = config.notify_socket.take();
    let tell_systemd = |assignments: &str| systemd::tell(notify_socket.as_deref(), assignments);
    // An older or damaged store can take minutes.
    tell_systemd("STATUS=opening the store");
    let store = Store::open(&config.place).map_err(|error| error.to_string())?;
    let key = match config.place.folder() {
        Some(folder) => Key::in_file(&folder.join(KEY_FILE)),
        None => Key::random(),
    }?;
    let opened = Exports::open(store, config.limits, LedgerKey::new(&key), metrics.clone());
    let (exports, writer, woken) = opened.map_err(|error| {
        format!(
            "cannot use the stored exports: {error}; see what the kernel's log says of the disk"
        )
    })?;
    let folder = config
        .place
        .folder()
        .map(|folder| folder.canonicalize().unwrap_or(folder.into()));
    let folder = folder.map_or("none".into(), |folder| folder.display().to_string());
    let networks = config
        .attempts
        .rules
        .allowed
        .iter()
        .map(ToString::to_string);
    let mut networks = networks.collect::<Vec<_>>().join(",");
    if networks.is_empty() {
        networks.push_str("none");
    }
    log::info!(
        version = env!("CARGO_PKG_VERSION"), name = config.name.as_str(), data_dir = folder.as_str(),
        allow_network = networks.as_str(), unfinished = exports.unfinished();
        "starting"
    );

    let secret = secret(config.secret, &config.place);

    // These threads stop when the senders are dropped.
    let (stop_writer, writer_stopping) = bounded::<()>(0);
    let (stop_worker, worker_stopping) = bounded::<()>(0);
    let (stop_checkpoints, checkpoints_stopping) = bounded::<()>(0);
    let writer = threads::spawn("writer", move || writer.run(&writer_stopping));
    let written = exports.clone();
    let checkpoints = threads::spawn("checkpoints", move || {
        written.make_checkpoints(&checkpoints_stopping);
    });
    // With --port 0 the port is known only now.
    let own_ports = [Some(address), admin_address].into_iter().flatten();
    config.attempts.rules.own_ports = own_ports.map(|address| address.port()).collect();
    let client = Client::new(config.attempts);
    let worker_ended = worker::start(
        woken,
        worker_stopping,
        exports.clone(),
        client,
        config.worker,
    );
    let owner = Arc::new(Owner {
        key: Owner::key(&config.place)?,
        hosts: config.admin_hosts,
        exports: exports.clone(),
        secret: secret.clone(),
        identity: config.connections.identity.clone(),
        place: config.place.clone(),
        limits: config.limits,
        apps: address,
        port: admin_address,
        logins: Mutex::default(),
    });
    let waits = Arc::new(Waits::default());
    let service = Service {
        policy: Policy {
            name: config.name,
            secret,
        },
        exports: exports.clone(),
        waits: waits.clone(),
    };
    let server = Server::start(config.place.folder(), service, config.threads).map_err(|error| {
        format!(
            "cannot make a socket in the data folder or in {}: {error}; make one of them writable",
            env::temp_dir().display()
        )
    })?;
    let scheme = config.connections.scheme();
    let gate = Gate::open(
        listener,
        Serve::Pool(&server.socket(), waits.clone()),
        config.connections,
        metrics,
    )
    .map_err(|error| format!("cannot serve on {address}: {error}"))?;
    let owner_socket = owner.open_socket();
    let owner_gate = match admin {
        Some((listener, address)) => Some(open_admin(&owner, listener, address, scheme)?),
        None => None,
    };
    log::info!(address:% = address, scheme; "listening");
    tell_systemd(&format!(
        "READY=1\nSTATUS=listening on {scheme}://{address}"
    ));

    // The thread that sends ends only with the process.
    let signal = stop.recv().unwrap_or(SIGTERM);
    log::info!(signal; "stopping");
    tell_systemd("STOPPING=1\nSTATUS=answering the last requests");
    let stopping = Instant::now();
    let last_attempt = stopping + LAST_ATTEMPT;
    // First, so that no further attempt begins.
    drop(stop_worker);
    gate.close();
    owner_gate.iter().for_each(Gate::close);
    // Parked polls are answered with the state of their exports.
    waits.hurry();
    // Requests that were begun are answered while the threads that do so still run.
    let last_answer = stopping + LAST_ANSWERS;
    gate.drain(last_answer);
    owner_gate
        .into_iter()
        .for_each(|gate| gate.drain(last_answer));
    owner_socket
        .into_iter()
        .for_each(|socket| socket.stop(last_answer));
    server.stop();
    // Nothing is ever sent: it is disconnected at the end of the last attempt.
    let _ = worker_ended.recv_deadline(last_attempt);
    drop(stop_checkpoints);
    let last_commit = Instant::now() + LAST_COMMIT;
    checkpoints.ends_within(LAST_COMMIT);
    drop(stop_writer);
    writer.ends_within(last_commit.saturating_duration_since(Instant::now()));
    log::info!(unfinished = exports.unfinished(); "stopped");
    logging::flush();
    Ok(())
}

/// The listener of the owner's port, and where it listens.
fn bind_admin(address: SocketAddr) -> Result<(TcpListener, SocketAddr), String> {
    TcpListener::bind(address)
        .and_then(|listener| listener.local_addr().map(|address| (listener, address)))
        .map_err(|error| {
            format!(
                "cannot listen on {address} for the owner: {error}; choose another --admin, or stop what \
                 uses it"
            )
        })
}

fn open_admin(
    owner: &Arc<Owner>,
    listener: TcpListener,
    address: SocketAddr,
    scheme: &str,
) -> Result<Gate, String> {
    let gate = owner
        .open_port(listener)
        .map_err(|error| format!("cannot serve the owner on {address}: {error}"))?;
    log::info!(address:% = address, scheme; "listening for the owner");
    if owner.is_exposed() {
        log::warn!(
            address:% = address;
            "the owner's port is open to the network without TLS: give a certificate, or listen on 127.0.0.1"
        );
    }
    Ok(gate)
}

/// The key for checking tokens, which is given or will come from the arbiter.
fn secret(source: SecretSource, place: &Place) -> Arc<Secret> {
    match source {
        SecretSource::Given(key) => Arc::new(Secret::given(key)),
        SecretSource::Arbiter(settings) => {
            let secret = Arc::new(Secret::awaited());
            let folder = place.folder().map(Path::to_owned);
            // Its thread needs no stop, as it replaces its file atomically.
            arbiter::start(settings, folder, secret.clone());
            secret
        }
    }
}

/// Sends the first signal that asks the process to stop through the channel, and exits at the second. At
/// SIGHUP, reads the certificate again.
fn signals(identity: Option<Arc<Identity>>) -> io::Result<Receiver<i32>> {
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP])?;
    let (sender, first) = bounded(1);
    threads::spawn("signals", move || {
        let mut stopping = false;
        for signal in signals.forever() {
            if signal == SIGHUP {
                reload(identity.as_deref());
            } else if stopping {
                logging::flush();
                process::exit(EXIT_SIGNAL + signal);
            } else {
                stopping = true;
                // The receiver lives until the process ends.
                let _ = sender.send(signal);
            }
        }
    });
    Ok(first)
}

fn reload(identity: Option<&Identity>) {
    let Some(identity) = identity else {
        return log::warn!("SIGHUP: there is no certificate to read again; start anew to have one");
    };
    let file = identity.path().display();
    match identity.reload() {
        Ok(()) => log::info!(file:% = file; "certificate read again"),
        Err(reason) => {
            log::error!(file:% = file, reason = reason.as_str(); "the old certificate stays")
        }
    }
}
