//! The service as a package installs it: what it tells systemd, and the files that go with it.

#[path = "packaging/files.rs"]
mod files;
mod support;

use std::collections::BTreeSet;
use std::fs;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;

use support::{PATIENCE, Service, command, not_run, program, root};
use tempfile::TempDir;

/// The socket on which systemd would listen.
fn manager(path: &Path) -> UnixDatagram {
    patient(UnixDatagram::bind(path).unwrap())
}

fn patient(socket: UnixDatagram) -> UnixDatagram {
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

fn told(manager: &UnixDatagram) -> String {
    let mut message = [0; 4096];
    let length = manager.recv(&mut message).unwrap();
    String::from_utf8(message[..length].to_vec()).unwrap()
}

fn begin(folder: &Arc<TempDir>, notify_socket: &str) -> Service {
    let mut command = command();
    command.env("NOTIFY_SOCKET", notify_socket);
    Service::begin(folder.clone(), command, &[])
}

/// Follows a start and a stop, and asks for the status as soon as the service says that it is ready.
fn is_told_of_start_and_stop(folder: &Arc<TempDir>, manager: &UnixDatagram, notify_socket: &str) {
    let mut service = begin(folder, notify_socket);
    assert_eq!(told(manager), "STATUS=opening the store");
    let ready = told(manager);
    let address = ready
        .strip_prefix("READY=1\nSTATUS=listening on http://")
        .unwrap_or_else(|| panic!("{ready}"));
    service.address = address.parse().unwrap();
    assert!(service.folder().join("exports.db").exists());
    assert_eq!(service.request("GET", "/status", &[], b"").status, 200);
    service.signal("TERM");
    assert_eq!(
        told(manager),
        "STOPPING=1\nSTATUS=answering the last requests"
    );
    assert_eq!(service.ended().code(), Some(0));
    manager.set_nonblocking(true).unwrap();
    assert!(manager.recv(&mut [0]).is_err(), "there was more to tell");
}

#[test]
fn systemd_is_told_when_the_service_opens_its_store_listens_and_stops() {
    let folder = Arc::new(tempfile::tempdir().unwrap());
    let path = folder.path().join("notify");
    is_told_of_start_and_stop(&folder, &manager(&path), path.to_str().unwrap());
}

#[test]
fn systemd_may_have_an_abstract_socket() {
    let folder = Arc::new(tempfile::tempdir().unwrap());
    let name = format!("export-service-{}", folder.path().display());
    let address = SocketAddr::from_abstract_name(&name).unwrap();
    let manager = patient(UnixDatagram::bind_addr(&address).unwrap());
    is_told_of_start_and_stop(&folder, &manager, &format!("@{name}"));
}

#[test]
fn a_service_that_cannot_use_its_store_never_says_that_it_is_ready() {
    let folder = Arc::new(tempfile::tempdir().unwrap());
    let first = Service::start_in(folder.clone(), &[]);
    let path = folder.path().join("notify");
    let manager = manager(&path);
    let mut second = begin(&folder, path.to_str().unwrap());
    assert_eq!(second.ended().code(), Some(1));
    assert_eq!(told(&manager), "STATUS=opening the store");
    manager.set_nonblocking(true).unwrap();
    assert!(manager.recv(&mut [0]).is_err());
    drop(first);
}

#[test]
fn a_systemd_that_does_not_listen_keeps_the_service_from_nothing() {
    let folder = Arc::new(tempfile::tempdir().unwrap());
    let path = folder.path().join("notify");
    // Full, and never read.
    let _manager = manager(&path);
    let sender = UnixDatagram::unbound().unwrap();
    sender.set_nonblocking(true).unwrap();
    while sender.send_to(b"WATCHDOG=1", &path).is_ok() {}
    let gone = folder.path().join("gone");
    fs::write(&gone, "").unwrap();
    for socket in [
        path.to_str().unwrap(),
        gone.to_str().unwrap(),
        "vsock:2:1",
        "",
    ] {
        let mut service = begin(&folder, socket);
        assert!(service.listens(), "{socket}");
        assert_eq!(service.request("GET", "/status", &[], b"").status, 200);
        service.signal("TERM");
        assert_eq!(service.ended().code(), Some(0), "{socket}");
    }
}

fn text(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap()
}

#[test]
fn the_default_file_names_every_setting_and_sets_none() {
    let unit = text("scripts/packaging/export-service.service");
    let default_file = files::default_file(&unit);
    let serve = files::serve();
    let settings = serve
        .get_arguments()
        .filter(|argument| !argument.is_hide_set());
    let variables = settings.filter_map(|argument| argument.get_env());
    let variables: BTreeSet<_> = variables.map(|name| name.to_str().unwrap()).collect();
    assert!(variables.len() > 10);
    let words = |c: char| !c.is_ascii_uppercase() && !c.is_ascii_digit() && c != '_';
    let named: BTreeSet<_> = default_file
        .split(words)
        .filter(|word| word.starts_with("EXPORT_") || word.starts_with("DATABOX_"))
        .collect();
    assert_eq!(named, variables);
    for line in default_file.lines() {
        assert!(line.is_empty() || line.starts_with('#'), "{line}");
    }
    for (set, value) in [
        ("#EXPORT_BIND=", "127.0.0.1"),
        ("#EXPORT_THREADS=", "8"),
        ("#EXPORT_EPHEMERAL=", "false"),
        ("#EXPORT_CA_FILE=", ""),
    ] {
        assert!(default_file.contains(&format!("\n{set}{value}\n")), "{set}");
    }
    assert!(!default_file.contains("SECRET="));
}

#[test]
fn all_settings_of_the_default_file_work_as_they_are_written_there() {
    let unit = text("scripts/packaging/export-service.service");
    let default_file = files::default_file(&unit);
    let lines = default_file
        .lines()
        .filter_map(|line| line.strip_prefix('#'));
    let settings = lines.filter_map(|line| line.split_once('='));
    let checked = command()
        .args(["serve", "--check"])
        .envs(settings.filter(|(name, _)| !name.starts_with(' ')))
        .env("EXPORT_SECRET", support::SECRET)
        .output()
        .unwrap();
    assert!(checked.status.success(), "{checked:?}");
}

#[test]
fn every_command_has_its_manual_page_and_is_completed() {
    let folder = tempfile::tempdir().unwrap();
    files::write(folder.path(), "").unwrap();
    let serve = files::serve();
    let page = |name: &str| fs::read_to_string(folder.path().join("man").join(name)).unwrap();
    let served = page("export-service-serve.1");
    for argument in serve
        .get_arguments()
        .filter_map(|argument| argument.get_env())
    {
        let variable = argument.to_str().unwrap();
        assert!(served.contains(variable) || variable == "EXPORT_MAX_RELIEVED");
    }
    let completions = folder.path().join("completions");
    for shell in [
        "export-service.bash",
        "_export-service",
        "export-service.fish",
    ] {
        let completion = fs::read_to_string(completions.join(shell)).unwrap();
        for command in ["serve", "token", "status"] {
            page(&format!("export-service-{command}.1"));
            assert!(completion.contains(command), "{shell}");
        }
    }
    // As Bash does it at the tab key: the words, and the number of the one that is completed.
    for (words, expected) in [
        ("export-service sta", "status"),
        ("export-service token --dest", "--destination"),
    ] {
        let completed = Command::new("bash")
            .args([
                "-euc",
                r#"source "$1"; function=$(complete -p export-service); function=${function##*-F };
                read -ra COMP_WORDS <<<"$2"; COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
                ${function%% *} export-service "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
                echo "${COMPREPLY[@]}""#,
                "bash",
            ])
            .arg(completions.join("export-service.bash"))
            .arg(words)
            .output()
            .unwrap();
        assert_eq!(
            String::from_utf8_lossy(&completed.stdout).trim(),
            expected,
            "{completed:?}"
        );
    }
}

#[test]
fn systemd_accepts_the_unit_and_finds_it_little_exposed() {
    let Ok(analyze) = Command::new("systemd-analyze").arg("--version").output() else {
        return not_run("systemd-analyze is not installed");
    };
    assert!(analyze.status.success());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("export-service.service");
    let unit = text("scripts/packaging/export-service.service");
    // It has to exist, and is not installed here.
    let unit = unit.replace("/usr/bin/export-service", program().to_str().unwrap());
    fs::write(&path, unit).unwrap();
    for arguments in [
        &["verify", "--man=no"][..],
        // Tenths.
        &["security", "--offline=true", "--threshold=16"],
    ] {
        let analyze = Command::new("systemd-analyze")
            .args(arguments)
            .arg(&path)
            .output();
        let said = analyze.unwrap();
        assert!(said.status.success(), "{said:?}");
        assert!(
            arguments[0] != "verify" || said.stderr.is_empty(),
            "{said:?}"
        );
    }
}

/// Runs a script as root of a machine with empty `/etc` and `/var/lib`, which only it sees. None where that is
/// not allowed.
fn on_a_new_machine(script: &str) -> Option<Output> {
    let run = |script: &str| {
        Command::new("unshare")
            .args(["--map-root-user", "--mount", "sh", "-euc"])
            .args([
                &format!("mount -t tmpfs tmpfs /etc\nmount -t tmpfs tmpfs /var/lib\n{script}"),
                "sh",
            ])
            .arg(root().join("scripts/packaging"))
            .output()
            .unwrap()
    };
    if !run(":").status.success() {
        not_run("folders of its own take a user namespace with mounts, which is not allowed here");
        return None;
    }
    Some(run(script))
}

#[test]
fn the_first_installation_makes_a_secret_that_later_ones_keep_and_a_purge_removes() {
    let done = on_a_new_machine(
        r#"
        export PATH="$PATH:/usr/sbin:/sbin"
        mount -t tmpfs tmpfs /usr/share
        mkdir /usr/share/export-service
        echo '#EXPORT_THREADS=8' >/usr/share/export-service/default
        "$1/postinst" configure
        stat -c %a /etc/export-service.env
        grep -cx 'EXPORT_SECRET=[0-9a-f]\{64\}' /etc/export-service.env
        cmp /usr/share/export-service/default /etc/default/export-service
        cp /etc/export-service.env /etc/first
        echo EXPORT_THREADS=4 >/etc/default/export-service
        "$1/postinst" configure 0.1.0-1
        cmp /etc/first /etc/export-service.env
        cat /etc/default/export-service
        mkdir -p /var/lib/private/export-service
        ln -s private/export-service /var/lib/export-service
        "$1/postrm" remove
        ls -A /etc /var/lib
        "$1/postrm" purge
        ls -A /etc /var/lib
        "#,
    );
    let Some(done) = done else { return };
    assert!(done.status.success(), "{done:?}");
    assert_eq!(
        String::from_utf8(done.stdout).unwrap(),
        "600\n1\nEXPORT_THREADS=4\n\
         /etc:\ndefault\nexport-service.env\nfirst\n\n/var/lib:\nexport-service\nprivate\n\
         /etc:\ndefault\nfirst\n\n/var/lib:\nprivate\n"
    );
}

#[test]
fn the_control_script_has_the_settings_of_the_unit_and_of_both_files() {
    let script = format!(
        r#"
        mkdir /etc/default
        cat >/etc/default/export-service <<'TEXT'
#EXPORT_THREADS=9
EXPORT_ALLOW_NETWORKS=192.168.1.7/32, 10.0.0.5
EXPORT_MAX_STORE="1000000"
DATABOX_LOCAL_NAME=$(touch /etc/run)box
EXPORT_LOG_FORMAT='json'
EXPORT_RETENTION=2h 
touch /etc/run
TEXT
        printf '%s' 'EXPORT_SECRET="a b;c"' >/etc/export-service.env
        mkdir /etc/bin
        ln -s '{}' /etc/bin/export-service
        PATH=/etc/bin:$PATH
        "$1/export-service-ctl" serve --check
        ! "$1/export-service-ctl" serve
        ! "$1/export-service-ctl" --port 1
        "$1/export-service-ctl" token --destination https://a.example/ >/etc/token
        ls /etc
        "#,
        program().display()
    );
    let Some(done) = on_a_new_machine(&script) else {
        return;
    };
    assert!(done.status.success(), "{done:?}");
    let shown = String::from_utf8(done.stdout).unwrap();
    let lines: Vec<Vec<_>> = shown
        .lines()
        .map(|line| line.split("  ").collect())
        .collect();
    let value = |flag: &str| {
        let mut line = lines.iter().find(|line| line[0] == flag).unwrap()[1..].iter();
        line.find(|word| !word.is_empty()).unwrap().trim()
    };
    for (flag, expected) in [
        ("--threads", "8"),
        ("--allow-network", "192.168.1.7/32, 10.0.0.5"),
        ("--max-store", "1000000"),
        ("--name", "$(touch /etc/run)box"),
        ("--log-format", "json"),
        ("--retention", "2h"),
        ("--secret", "set"),
    ] {
        assert_eq!(value(flag), expected, "{shown}");
    }
    let unit = text("scripts/packaging/export-service.service");
    for (variable, flag) in [("EXPORT_DATA_DIR", "--data-dir"), ("EXPORT_BIND", "--bind")] {
        assert!(
            unit.contains(&format!("\nEnvironment={variable}={}\n", value(flag))),
            "{shown}"
        );
    }
    assert!(
        shown.ends_with("\nbin\ndefault\nexport-service.env\ntoken\n"),
        "{shown}"
    );
    let refusals = String::from_utf8(done.stderr).unwrap();
    assert_eq!(
        refusals.matches("systemctl start export-service").count(),
        2,
        "{refusals}"
    );
}

#[test]
fn the_labels_of_the_image_are_those_of_the_crate() {
    let dockerfile = text("Dockerfile");
    for (name, value) in [
        ("version", env!("CARGO_PKG_VERSION")),
        ("title", env!("CARGO_PKG_NAME")),
        ("licenses", env!("CARGO_PKG_LICENSE")),
        ("description", env!("CARGO_PKG_DESCRIPTION")),
    ] {
        let label = format!("org.opencontainers.image.{name}=\"{value}\"");
        assert!(dockerfile.contains(&label), "{label}");
    }
}
