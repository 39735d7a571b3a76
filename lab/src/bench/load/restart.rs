//! A proxy that ends and is started again while there is load: what breaks, and for how long.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::connect::request;
use super::idle::Waiting;
use super::{Measured, Target};
use crate::bench::accounting;
use crate::bench::interrupt;
use crate::bench::pinning::{self, End};
use crate::standing::Daemon;

/// The node whose proxy is restarted: the client's.
const NODE: u8 = 1;
/// Connections that stand and make requests.
const STANDING: u16 = 16;
/// Time between two requests on a standing connection, and between two new connections.
const EVERY: Duration = Duration::from_millis(5);
/// What a new connection may take; one that takes longer has failed.
const PROBE_LIMIT: Duration = Duration::from_millis(250);
/// Load before the proxy is stopped and after it is ready again.
const AROUND: Duration = Duration::from_millis(700);

/// What new connections saw.
#[derive(Debug)]
struct Probes {
    /// The longest time from one success to the next.
    gap: Duration,
    succeeded: u32,
    failed: u32,
}

/// Ends the proxy of the client's node with SIGTERM, which gives standing connections the time of its drain, or with
/// SIGKILL; starts it again when it has ended, and goes on until it is ready.
pub fn restart(target: &Target<'_>, killed: bool) -> Result<Measured> {
    let lab = &target.stage.lab;
    let over = AtomicBool::new(false);
    let cpu = |node| -> Result<_> {
        let process = lab.process(node, Daemon::Proxy);
        let process = process.with_context(|| format!("proxy{node} does not run"))?;
        Ok(accounting::process(process.pid)?)
    };
    let begun = [cpu(1)?, cpu(2)?];
    let standing = pinning::on(End::Client, || {
        target.client.run(|| -> Result<Vec<Waiting>> {
            (0..STANDING).map(|_| Waiting::open(target.web())).collect()
        })
    })???;
    let (probes, lost, restarted) = thread::scope(|scope| {
        let over = &over;
        let users: Vec<_> = standing
            .into_iter()
            .map(|connection| {
                scope.spawn(move || pinning::on(End::Client, || lasts(connection, over)))
            })
            .collect();
        let prober =
            scope.spawn(|| pinning::on(End::Client, || target.client.run(|| probe(target, over))));
        let restarted = (|| -> Result<_> {
            thread::sleep(AROUND);
            interrupt::check()?;
            let used = cpu(NODE)?.since(begun[0]);
            let stopping = Instant::now();
            if killed {
                lab.kill(NODE, Daemon::Proxy)?;
            } else {
                lab.stop(NODE, Daemon::Proxy)?;
            }
            let stopped = stopping.elapsed();
            let starting = Instant::now();
            lab.start(NODE, Daemon::Proxy)?;
            lab.wait_ready(NODE, &|_| {})?;
            let ready = starting.elapsed();
            thread::sleep(AROUND);
            Ok((used, stopped, ready))
        })();
        over.store(true, Ordering::Relaxed);
        let mut lost = 0;
        for user in users {
            let lasted = user
                .join()
                .map_err(|_| anyhow::anyhow!("a user of a connection died"))??;
            lost += u32::from(!lasted);
        }
        let probes = prober
            .join()
            .map_err(|_| anyhow::anyhow!("the prober died"))????;
        Ok::<_, anyhow::Error>((probes, lost, restarted?))
    })?;
    let (used, stopped, ready) = restarted;
    let again = target
        .client
        .run(|| request(target.web(), PROBE_LIMIT * 4))?;
    again.context("a connection after the restart")?;
    if probes.succeeded == 0 {
        bail!("no new connection succeeded");
    }
    if lost == 0 && probes.failed == 0 && probes.gap < ready / 2 {
        bail!("nobody noticed the restart: the load did not pass through the proxy");
    }
    let milliseconds = |time: Duration| time.as_secs_f64() * 1e3;
    let extra = [
        ("standing_connections_lost", f64::from(lost)),
        ("new_connections_failed", f64::from(probes.failed)),
        ("new_connections", f64::from(probes.succeeded)),
        ("ended_after_ms", milliseconds(stopped)),
        ("ready_after_ms", milliseconds(ready)),
    ];
    Ok(Measured {
        value: milliseconds(probes.gap),
        work: 1.0,
        extra: extra.map(|(key, value)| (key.to_owned(), value)).into(),
        proxies_cpu: Some(used.plus(cpu(1)?).plus(cpu(2)?.since(begun[1]))),
        ..Measured::default()
    })
}

/// Makes requests on a connection until it is over; whether it lasted so long.
fn lasts(mut connection: Waiting, over: &AtomicBool) -> bool {
    while !over.load(Ordering::Relaxed) {
        if connection.ask().is_err() {
            return false;
        }
        thread::sleep(EVERY);
    }
    true
}

fn probe(target: &Target<'_>, over: &AtomicBool) -> Result<Probes> {
    let mut probes = Probes {
        gap: Duration::ZERO,
        succeeded: 0,
        failed: 0,
    };
    let mut last = Instant::now();
    while !over.load(Ordering::Relaxed) {
        interrupt::check()?;
        if request(target.web(), PROBE_LIMIT).is_ok() {
            probes.succeeded += 1;
            probes.gap = probes.gap.max(last.elapsed());
            last = Instant::now();
        } else {
            probes.failed += 1;
        }
        thread::sleep(EVERY);
    }
    probes.gap = probes.gap.max(last.elapsed());
    Ok(probes)
}
