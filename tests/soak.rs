//! Load that leaves nothing behind: descriptors, memory, tunnels and tables are afterwards what they were before.
#![allow(clippy::unwrap_used, clippy::expect_used)]
#![allow(
    clippy::disallowed_methods,
    reason = "applications of a test, no part of the proxy"
)]

mod harness;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use harness::Variant::{self, Inpod, NodeHybrid};
use harness::{Stage, eventually, own};
use lab::standing::Daemon;
use rstest::rstest;
use socket2::SockRef;

/// Where the applications listen.
const PORT: u16 = 8095;
/// How long one step of a connection may take.
const STEP: Duration = Duration::from_secs(10);
/// Resident memory that may stay, in KiB: the allocator keeps some pages of every thread.
const MEMORY_KEPT: u64 = 24 << 10;

/// How long the load goes on, and how long each client pauses between two connections: half an hour in the full suite, at a
/// rate that leaves room for the other tests of a small machine.
fn dose() -> (Duration, Duration) {
    let all = std::env::var("AMBIDEX_TEST_SUITE").is_ok_and(|suite| suite == "all");
    if all {
        (Duration::from_secs(30 * 60), Duration::from_millis(50))
    } else {
        (Duration::from_secs(4), Duration::ZERO)
    }
}

/// Time between two lines about a load that goes on for long.
const TELLS_EVERY: Duration = Duration::from_secs(120);

#[rstest]
fn load_leaves_nothing_behind(#[values(NodeHybrid, Inpod)] variant: Variant) {
    let scene = own(&variant.spec());
    let ends = AtomicBool::new(false);
    let made = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let _ends = Raise(&ends);
        for pod in ["pod1-1", "pod2-1", "plain1"] {
            let netns = scene.lab.netns(pod).unwrap();
            let listener = netns.run(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)));
            let listener = listener.unwrap().unwrap();
            listener.set_nonblocking(true).unwrap();
            let ends = &ends;
            scope.spawn(move || {
                while !ends.load(Ordering::Relaxed) {
                    match listener.accept() {
                        Ok((stream, _)) => drop(scope.spawn(move || echo(stream))),
                        Err(_) => std::thread::sleep(Duration::from_millis(1)),
                    }
                }
            });
        }
        // Opens every tunnel, makes every table as large as it gets, and lets the allocator take what it keeps.
        load(&scene, (Duration::from_millis(1500), Duration::ZERO), &made);
        settle(&scene);
        let before = [1, 2].map(|node| measure(&scene, node));
        made.store(0, Ordering::Relaxed);
        load(&scene, dose(), &made);
        settle(&scene);
        let made = made.load(Ordering::Relaxed);
        assert!(made > 100, "{made} connections are no load");
        for (node, before) in [1, 2].into_iter().zip(before) {
            let mut after = measure(&scene, node);
            let what = format!("proxy{node} after {made} connections");
            let back = |after: &Measured| {
                after.descriptors <= before.descriptors
                    && after.tunnels <= before.tunnels
                    && after.tasks <= before.tasks
                    && after.memory <= before.memory + MEMORY_KEPT
            };
            let deadline = Instant::now() + Duration::from_secs(20);
            while !back(&after) && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(200));
                after = measure(&scene, node);
            }
            println!("{variant:?}: {what}: {before:?} then {after:?}");
            assert!(back(&after), "{what}: {before:?} then {after:?}");
        }
    });
}

struct Raise<'a>(&'a AtomicBool);

impl Drop for Raise<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// What must not grow.
#[derive(Debug)]
struct Measured {
    descriptors: f64,
    tunnels: f64,
    tasks: f64,
    /// Resident, in KiB.
    memory: u64,
}

fn measure(scene: &Stage, node: u8) -> Measured {
    let pid = scene.lab.process(node, Daemon::Proxy).unwrap().pid;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let memory = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let memory = memory.unwrap().trim().trim_end_matches(" kB");
    Measured {
        descriptors: scene.metric(node, "process_open_fds", &[]),
        tunnels: scene.metric(node, "ambidex_pooled_tunnels", &[]),
        tasks: scene.metric(node, "tokio_num_alive_tasks", &[]),
        memory: memory.parse().unwrap(),
    }
}

/// Waits until no connection is open at either proxy.
fn settle(scene: &Stage) {
    for node in [1, 2] {
        eventually(
            "all connections have ended",
            Duration::from_secs(30),
            || scene.metric(node, "istio_tcp_sockets_open", &[]) == 0.0,
        );
    }
}

/// Connections in all directions, ended in all ways: in order, by one side first, by reset, in the middle of an answer.
fn load(scene: &Stage, (how_long, pause): (Duration, Duration), made: &AtomicU64) {
    let began = Instant::now();
    let until = began + how_long;
    let paths = [
        ("pod1-1", "pod2-1"),
        ("pod2-1", "pod1-1"),
        ("plain1", "pod1-1"),
        ("pod2-1", "plain1"),
    ];
    std::thread::scope(|scope| {
        for (from, to) in paths {
            let netns = scene.lab.netns(from).unwrap();
            let to: SocketAddr = (scene.ip(to), PORT).into();
            scope.spawn(move || {
                for round in 0u32.. {
                    if Instant::now() > until {
                        return;
                    }
                    // A client that ends badly sees errors, as it should.
                    let _ = netns.run(|| exchange(to, round)).unwrap();
                    made.fetch_add(1, Ordering::Relaxed);
                    std::thread::sleep(pause);
                }
            });
        }
        for told in 1u32.. {
            let next = began + TELLS_EVERY * told;
            if next > until {
                return;
            }
            std::thread::sleep(next.saturating_duration_since(Instant::now()));
            let made = made.load(Ordering::Relaxed);
            let proxies = [1, 2].map(|node| measure(scene, node));
            println!(
                "after {:?} and {made} connections: {proxies:?}",
                began.elapsed()
            );
        }
    });
}

fn exchange(to: SocketAddr, round: u32) -> std::io::Result<()> {
    let mut stream = TcpStream::connect_timeout(&to, STEP)?;
    stream.set_read_timeout(Some(STEP))?;
    stream.set_write_timeout(Some(STEP))?;
    let bytes = [7; 20_000];
    match round % 5 {
        0 => {
            stream.write_all(&bytes)?;
            stream.read_exact(&mut [0; 20_000])?;
        }
        1 => {
            stream.write_all(&bytes)?;
            stream.shutdown(Shutdown::Write)?;
            stream.read_to_end(&mut Vec::new())?;
        }
        2 => {
            stream.write_all(&bytes)?;
            stream.read_exact(&mut [0; 100])?;
            SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
        }
        3 => SockRef::from(&stream).set_linger(Some(Duration::ZERO))?,
        _ => {}
    }
    Ok(())
}

/// An application that says what it hears, until its client ends.
fn echo(mut stream: TcpStream) {
    let limits = stream
        .set_nonblocking(false)
        .and_then(|()| stream.set_read_timeout(Some(STEP)))
        .and_then(|()| stream.set_write_timeout(Some(STEP)));
    let mut buffer = [0; 4096];
    while limits.is_ok() {
        match stream.read(&mut buffer) {
            Ok(read @ 1..) if stream.write_all(&buffer[..read]).is_ok() => {}
            _ => return,
        }
    }
}
