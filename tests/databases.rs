//! What real programs with long-lived connections see of a pod that changes its capture: Redis and PostgreSQL, as servers in
//! that pod and as clients there.
#![allow(clippy::unwrap_used, clippy::expect_used)]
#![allow(
    clippy::disallowed_methods,
    reason = "applications of a test, no part of the proxy"
)]

mod harness;
mod runtime;

use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use harness::{Scene, eventually, own, spec};
use lab::topology::Mode;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rstest::rstest;
use runtime::ambidex;

/// The pod whose capture changes: the node's at first.
const SUBJECT: &str = "pod1-1";
const CHANGES: [&str; 4] = ["inpod", "node", "inpod", "node"];
const PATIENCE: Duration = Duration::from_secs(40);

fn switch(scene: &Scene, to: &str) {
    let namespace = scene.pod(SUBJECT).namespace;
    let arguments = format!("mode set {namespace}/{SUBJECT} {to} --drain 10m");
    ambidex(&scene.lab, &arguments).with_code(0);
}

/// A client that lost its connection may wait for ever.
const LONGEST: Duration = Duration::from_secs(150);

/// A program in a pod, ended when it is dropped or has run for too long.
struct Running {
    program: Child,
    /// Dropped to call the watcher off.
    watched: Option<mpsc::Sender<()>>,
}

impl Running {
    fn start(scene: &Scene, target: &str, command: &mut Command) -> Self {
        let netns = scene.lab.netns(target).unwrap();
        let program = netns.run(|| command.spawn()).unwrap();
        let program = program.unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let pid = Pid::from_raw(program.id().try_into().unwrap());
        let (watched, over) = mpsc::channel();
        std::thread::spawn(move || {
            if over.recv_timeout(LONGEST) == Err(mpsc::RecvTimeoutError::Timeout) {
                let _ = kill(pid, Signal::SIGKILL);
            }
        });
        Self {
            program,
            watched: Some(watched),
        }
    }

    /// Ends its input and says what it has printed since, and whether it succeeded.
    fn end(mut self, input: ChildStdin, output: &mut impl Read) -> (String, bool) {
        drop(input);
        let mut said = String::new();
        output.read_to_string(&mut said).unwrap();
        let success = self.program.wait().unwrap().success();
        (said, success)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.watched.take());
        let _ = self.program.kill();
        let _ = self.program.wait();
    }
}

/// A client that is talked with by lines.
struct Dialogue {
    program: Running,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Dialogue {
    fn start(scene: &Scene, target: &str, command: &mut Command) -> Self {
        let command = command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut program = Running::start(scene, target, command);
        let input = program.program.stdin.take().unwrap();
        let output = BufReader::new(program.program.stdout.take().unwrap());
        Self {
            program,
            input,
            output,
        }
    }

    fn say(&mut self, text: &str) {
        self.input.write_all(text.as_bytes()).unwrap();
        self.input.flush().unwrap();
    }

    fn hear(&mut self) -> String {
        let mut line = String::new();
        assert_ne!(self.output.read_line(&mut line).unwrap(), 0, "it has ended");
        line.trim_end().to_owned()
    }

    fn end(mut self) -> (String, bool) {
        self.program.end(self.input, &mut self.output)
    }
}

fn listens(scene: &Scene, target: &str, port: u16) {
    let netns = scene.lab.netns(target).unwrap();
    let here = SocketAddr::from(([127, 0, 0, 1], port));
    eventually("the server listens", PATIENCE, || {
        netns.run(|| TcpStream::connect(here)).unwrap().is_ok()
    });
}

/// A Redis server that keeps nothing on disk.
fn redis(scene: &Scene, target: &str) -> Running {
    let mut command = Command::new("redis-server");
    command.args(["--bind", "0.0.0.0", "--protected-mode", "no"]);
    command.args(["--save", "", "--appendonly", "no"]);
    command.current_dir("/").stdout(Stdio::null());
    let server = Running::start(scene, target, &mut command);
    listens(scene, target, 6379);
    server
}

fn redis_cli(scene: &Scene, server: &str) -> Command {
    let mut command = Command::new("redis-cli");
    command.args(["-h", &scene.ip(server).to_string()]);
    command
}

/// Every message reaches the subscriber in its order, and every command of a pipeline is answered and done, while the pod
/// of one of them changes its capture.
#[rstest]
#[case::server_changes(SUBJECT, "pod2-2")]
#[case::client_changes("pod2-1", SUBJECT)]
fn redis_does_not_notice(#[case] server: &str, #[case] client: &str) {
    let scene = own(&spec(Mode::Mixed));
    let _server = redis(&scene, server);
    let cli = || redis_cli(&scene, server);
    let mut subscriber = Dialogue::start(&scene, client, cli().args(["subscribe", "news"]));
    // The three lines of the answer: "subscribe", the channel, 1.
    let answer: [String; 3] = std::array::from_fn(|_| subscriber.hear());
    assert_eq!(answer, ["subscribe", "news", "1"]);
    let mut publisher = Dialogue::start(&scene, client, &mut cli());
    let mut pipeline = Dialogue::start(&scene, client, cli().arg("--pipe"));
    let (mut message, mut key) = (0, 0);
    let mut speak = || {
        for _ in 0..20 {
            message += 1;
            publisher.say(&format!("publish news {message}\n"));
            assert_eq!(publisher.hear(), "1", "one heard message {message}");
            let heard: [String; 3] = std::array::from_fn(|_| subscriber.hear());
            assert_eq!(heard, ["message", "news", &message.to_string()]);
            let mut commands = String::new();
            for _ in 0..50 {
                key += 1;
                write!(commands, "SET k{key} v{key}\r\n").unwrap();
            }
            pipeline.say(&commands);
        }
    };
    for to in CHANGES {
        speak();
        std::thread::scope(|scope| {
            let change = scope.spawn(|| switch(&scene, to));
            while !change.is_finished() {
                speak();
            }
            change.join().unwrap();
        });
        speak();
    }
    let (said, success) = pipeline.end();
    assert!(success, "{said}");
    let wanted = format!("errors: 0, replies: {key}");
    assert!(said.contains(&wanted), "want {wanted}: {said}");
    publisher.say(&format!("dbsize\nget k{key}\n"));
    assert_eq!(publisher.hear(), key.to_string());
    assert_eq!(publisher.hear(), format!("v{key}"));
}

/// A PostgreSQL cluster of its own in a directory of its own.
struct Postgres {
    // Before its directory goes.
    _server: Running,
    _directory: tempfile::TempDir,
}

/// The programs of Debian's package, whatever its version.
fn postgres_program(name: &str) -> PathBuf {
    let versions = std::fs::read_dir("/usr/lib/postgresql").expect("package postgresql-15");
    versions
        .map(|version| version.unwrap().path().join("bin").join(name))
        .find(|program| program.exists())
        .expect("package postgresql-15")
}

/// The program refuses to run as root.
fn as_postgres(program: &str) -> Command {
    let users = std::fs::read_to_string("/etc/passwd").unwrap();
    let user = users.lines().find(|line| line.starts_with("postgres:"));
    let ids: Vec<u32> = user
        .unwrap()
        .split(':')
        .skip(2)
        .take(2)
        .map(|id| id.parse().unwrap())
        .collect();
    let mut command = Command::new(postgres_program(program));
    command
        .uid(ids[0])
        .gid(ids[1])
        .current_dir("/")
        .env("LC_ALL", "C");
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command
}

impl Postgres {
    fn start(scene: &Scene, target: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let everybody = std::os::unix::fs::PermissionsExt::from_mode(0o777);
        std::fs::set_permissions(directory.path(), everybody).unwrap();
        let data = directory.path().join("data");
        let mut made = as_postgres("initdb");
        made.args([
            "--auth",
            "trust",
            "--no-sync",
            "--encoding",
            "UTF8",
            "--pgdata",
        ]);
        let made = made.arg(&data).status().unwrap();
        assert!(made.success(), "initdb: {made}");
        let access = data.join("pg_hba.conf");
        std::fs::write(access, "host all all 0.0.0.0/0 trust\n").unwrap();
        let mut command = as_postgres("postgres");
        command.arg("-D").arg(&data).arg("-k").arg(directory.path());
        command.args(["-h", "0.0.0.0", "-p", "5432", "-c", "fsync=off"]);
        let server = Running::start(scene, target, &mut command);
        listens(scene, target, 5432);
        Self {
            _server: server,
            _directory: directory,
        }
    }
}

fn psql(scene: &Scene, server: &str) -> Command {
    let mut command = Command::new("psql");
    command.args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1"]);
    command.args(["-U", "postgres", "-h", &scene.ip(server).to_string()]);
    command.env("PGCONNECT_TIMEOUT", PATIENCE.as_secs().to_string());
    command
}

/// An open transaction and a COPY in each direction go on while the pod of one end changes its capture.
#[rstest]
#[case::server_changes(SUBJECT, "pod2-2")]
#[case::client_changes("pod2-1", SUBJECT)]
fn postgresql_does_not_notice(#[case] server: &str, #[case] client: &str) {
    let scene = own(&spec(Mode::Mixed));
    let _server = Postgres::start(&scene, server);
    let session = || Dialogue::start(&scene, client, &mut psql(&scene, server));
    let mut transaction = session();
    transaction.say("CREATE TABLE copied (n int, text text); CREATE TABLE kept (n int);\n");
    transaction.say("BEGIN; SELECT pg_current_xact_id();\n");
    let number = transaction.hear();
    let mut copy = session();
    copy.say("COPY copied FROM STDIN;\n");
    // More than fits into the buffers on the way: it goes on only as far as it is read.
    let mut download = session();
    download
        .say("COPY (SELECT n, repeat('x', 1000) FROM generate_series(1, 60000) n) TO STDOUT;\n");
    let (mut rows, mut inserted, mut read) = (0, 0, 0);
    let mut work = || {
        for _ in 0..10 {
            inserted += 1;
            transaction.say(&format!(
                "INSERT INTO kept VALUES ({inserted}); SELECT pg_current_xact_id();\n"
            ));
            assert_eq!(transaction.hear(), number, "still the same transaction");
            let mut lines = String::new();
            for _ in 0..100 {
                rows += 1;
                writeln!(lines, "{rows}\trow {rows}").unwrap();
            }
            copy.say(&lines);
            for _ in 0..20 {
                read += 1;
                let line = download.hear();
                assert!(
                    line == format!("{read}\t{}", "x".repeat(1000)),
                    "row {read}: {line}"
                );
            }
        }
    };
    for to in CHANGES {
        work();
        std::thread::scope(|scope| {
            let change = scope.spawn(|| switch(&scene, to));
            while !change.is_finished() {
                work();
            }
            change.join().unwrap();
        });
        work();
    }
    assert!(
        read < 60_000,
        "the table was read before all changes were over"
    );
    copy.say("\\.\nSELECT count(*), sum(n) FROM copied;\n");
    assert_eq!(copy.hear(), format!("{rows}|{}", rows * (rows + 1) / 2));
    transaction.say("COMMIT; SELECT count(*) FROM kept;\n");
    assert_eq!(transaction.hear(), inserted.to_string());
    while read < 60_000 {
        read += 1;
        let line = download.hear();
        assert!(line.starts_with(&format!("{read}\t")), "row {read}: {line}");
    }
    for session in [transaction, copy, download] {
        let (said, success) = session.end();
        assert!(success && said.is_empty(), "{said}");
    }
}
