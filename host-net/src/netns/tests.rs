#![allow(clippy::unwrap_used, clippy::expect_used)]

use super::*;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU32, Ordering};

/// A name that no other test run uses; removed with the value.
struct Name(String);

impl Name {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        Self(format!("axns-{}-{number}", std::process::id()))
    }
}

impl Drop for Name {
    fn drop(&mut self) {
        let _ = Netns::delete_named(&self.0);
    }
}

#[test]
fn a_named_namespace_can_be_opened_listed_and_deleted() {
    let name = Name::new();
    let made = Netns::create_named(&name.0).unwrap();
    assert_ne!(made.id(), Netns::current().unwrap().id());
    assert!(Netns::list_named().unwrap().contains(&name.0));
    let opened = Netns::open(Netns::path_of(&name.0)).unwrap();
    assert_eq!(opened.id(), made.id());

    let again = Netns::create_named(&name.0).unwrap_err();
    assert_eq!(again.kind(), io::ErrorKind::AlreadyExists);
    assert!(again.to_string().contains(&name.0));
    assert_eq!(
        Netns::open(Netns::path_of(&name.0)).unwrap().id(),
        made.id()
    );

    Netns::delete_named(&name.0).unwrap();
    assert!(!Netns::list_named().unwrap().contains(&name.0));
    Netns::delete_named(&name.0).unwrap();
    assert!(
        made.run(Netns::current).is_ok(),
        "the descriptor keeps it alive"
    );
}

#[test]
fn ip_sees_what_is_made_here() {
    let name = Name::new();
    Netns::create_named(&name.0).unwrap();
    let ip = |args: &[&str]| std::process::Command::new("ip").args(args).output();
    let shown = ip(&["-n", &name.0, "-o", "link"]).unwrap();
    let text = String::from_utf8(shown.stdout).unwrap();
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.contains("lo:") && text.contains("DOWN"), "{text}");
    let deleted = ip(&["netns", "del", &name.0]).unwrap();
    assert!(deleted.status.success());
    assert!(Netns::open(Netns::path_of(&name.0)).is_err());
}

#[test]
fn names_that_leave_the_directory_are_refused() {
    for name in ["", ".", "..", "a/b", "../x"] {
        let error = Netns::create_named(name).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{name}");
        assert!(Netns::delete_named(name).is_err(), "{name}");
    }
}

#[test]
fn run_returns_home_also_after_a_panic() {
    let home = Netns::current().unwrap().id();
    let there = Netns::create_unnamed().unwrap();
    let seen = there.run(|| Netns::current().unwrap().id()).unwrap();
    assert_eq!(seen, there.id());
    assert_eq!(Netns::current().unwrap().id(), home);

    let nested = there
        .run(|| there.run(|| Netns::current().unwrap().id()).unwrap())
        .unwrap();
    assert_eq!(nested, there.id());

    let panicked = catch_unwind(AssertUnwindSafe(|| there.run(|| panic!("in there"))));
    assert!(panicked.is_err());
    assert_eq!(Netns::current().unwrap().id(), home);
}

#[test]
fn processes_started_inside_belong_there() {
    let there = Netns::create_unnamed().unwrap();
    let output = there
        .run(|| {
            std::process::Command::new("readlink")
                .arg("/proc/self/ns/net")
                .output()
        })
        .unwrap()
        .unwrap();
    let link = String::from_utf8(output.stdout).unwrap();
    assert_eq!(link.trim(), there.id().to_string());
}

#[test]
fn what_is_not_a_network_namespace_is_refused() {
    for path in ["/proc/self/ns/mnt", "/proc/self/ns/uts", "/etc/passwd"] {
        let error = Netns::open(path).unwrap_err().to_string();
        assert_eq!(error, format!("{path}: not a network namespace"));
    }
    let missing = Netns::open("/run/netns/axns-absent").unwrap_err();
    assert_eq!(missing.kind(), io::ErrorKind::NotFound);
    assert!(missing.to_string().contains("/run/netns/axns-absent"));
    let received = File::open("/proc/self/ns/net").unwrap();
    assert_eq!(
        Netns::from_fd(received.into()).unwrap().id(),
        Netns::current().unwrap().id()
    );
}

/// Set in the environment of the process that is to die.
const DOOMED: &str = "AXNS_LOSE_THE_WAY_HOME";

#[test]
fn a_thread_that_cannot_return_takes_the_process_down() {
    if std::env::var_os(DOOMED).is_some() {
        let there = Netns::create_unnamed().unwrap();
        let _ = there.run(|| {
            let nobody = nix::unistd::Uid::from_raw(65534);
            nix::unistd::setresuid(nobody, nobody, nobody).unwrap();
        });
        return;
    }
    use std::os::unix::process::ExitStatusExt;
    let this = "netns::tests::a_thread_that_cannot_return_takes_the_process_down";
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", this, "--nocapture", "--test-threads=1"])
        .env(DOOMED, "1")
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.signal(), Some(nix::libc::SIGABRT), "{stderr}");
    assert!(
        stderr.contains("cannot return to network namespace net:["),
        "{stderr}"
    );
}
