//! The service as a package installs it: what it tells systemd, and the files that go with it.

mod support;

use std::fs;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::Path;
use std::sync::Arc;

use support::{PATIENCE, Service, command};
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
