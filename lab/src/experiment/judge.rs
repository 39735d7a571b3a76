//! What held: records of the load, packets and access logs against what has to be so.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use super::access::{Expected, Verdict, Wanted};
use super::driver::Records;
use super::engine::{Broken, Connection, Kind};
use super::file::{Assertions, Experiment};
use super::result::{ClearSeen, DeviceSeen, ErrorSeen, LoadSeen, OutsideSeen};
use super::steps::{Done, Outside};
use super::timeline::percentile;
use super::wire::{Flow, Heard, Place};
use crate::topology::Topology;
use crate::traffic::Saw;

/// What is long where the file says nothing of it, in milliseconds: less than the second after which a client sends its
/// first packet again.
const LONG_MS: f64 = 300.0;
/// Pieces of evidence for one assertion.
const MOST_EVIDENCE: usize = 10;
/// Errors that are kept.
const MOST_ERRORS: usize = 1000;
/// Connections in the clear that are kept of a device.
const MOST_CLEAR: usize = 200;

/// Something that was measured, and whether it is as it has to be.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Judged {
    /// What: the key of the file's `assertions`, or what every experiment has to keep.
    pub assertion: String,
    /// What was measured.
    pub measured: f64,
    /// The most that it may be; without it, it is measured only.
    pub limit: Option<f64>,
    /// Whether it is.
    pub holds: bool,
    /// The first things that count.
    pub evidence: Vec<String>,
}

/// All that was seen of an experiment.
pub struct Seen<'a> {
    /// What was to be done.
    pub experiment: &'a Experiment,
    /// Where.
    pub topology: &'a Topology,
    /// When the load began: microseconds since 1970.
    pub begun_us: u64,
    /// When its end began.
    pub ended_us: u64,
    /// What the load recorded.
    pub records: &'a Records,
    /// The steps.
    pub steps: &'a [Done],
    /// Times in which pods were outside the mesh.
    pub outside: &'a [Outside],
    /// What was heard on each device.
    pub heard: &'a [(String, Place, Heard)],
}

/// Packets in the clear, judged.
#[derive(Debug, Default)]
pub struct Packets {
    /// By device.
    pub devices: Vec<DeviceSeen>,
    /// Connections, the first ones of each device.
    pub clear: Vec<ClearSeen>,
}

/// How a connection, or a packet, stands to the mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stands {
    Inside,
    OnTheWay,
    Outside,
}

/// What is long in this experiment, in microseconds.
pub fn long_us(assertions: &Assertions) -> u64 {
    let long = assertions
        .delayed
        .map_or(LONG_MS, |delayed| delayed.over_ms);
    (long * 1e3) as u64
}

impl Seen<'_> {
    fn seconds(&self, us: u64) -> f64 {
        (us as i64 - self.begun_us as i64) as f64 / 1e6
    }

    fn address(&self, pod: &str) -> Option<IpAddr> {
        self.topology.pod(pod).map(|(_, pod)| pod.ip.into())
    }

    fn pods(&self) -> BTreeMap<IpAddr, &str> {
        let pods = self.topology.pods();
        pods.map(|(_, pod)| (pod.ip.into(), pod.name.as_str()))
            .collect()
    }

    /// How a pod stood in this time.
    fn stood(&self, pod: &str, from: u64, to: u64) -> Stands {
        let mut stands = Stands::Inside;
        for span in self.outside.iter().filter(|span| span.pod == pod) {
            if to < span.leaves_us || from > span.returned_us {
                continue;
            }
            let firm = from >= span.left_us && to <= span.returns_us;
            stands = if firm {
                Stands::Outside
            } else {
                Stands::OnTheWay
            };
        }
        stands
    }

    /// How client and server stood while a connection was being opened.
    fn ends(&self, connection: &Connection) -> [Stands; 2] {
        let took = connection.took_us.map(|took| connection.begun_us + took);
        let opened = took.unwrap_or(connection.ended_us);
        [&connection.from, &connection.to].map(|pod| self.stood(pod, connection.begun_us, opened))
    }

    /// The client's end, with the address of its pod.
    fn local(&self, connection: &Connection) -> Option<SocketAddr> {
        let port = connection.local?.port();
        Some((self.address(&connection.from)?, port).into())
    }

    fn is_outside(&self, connection: &Connection) -> bool {
        self.ends(connection) != [Stands::Inside; 2]
    }

    fn describe(&self, connection: &Connection) -> String {
        let port = connection
            .local
            .map_or_else(String::new, |local| format!(":{}", local.port()));
        format!("{}{port} to {}", connection.from, connection.to)
    }

    /// Connections that were opened while one of their pods was outside the mesh.
    pub fn outside_the_mesh(&self) -> Vec<OutsideSeen> {
        let all = self.records.connections.iter();
        all.filter(|connection| self.is_outside(connection))
            .map(|connection| OutsideSeen {
                begun_seconds: self.seconds(connection.begun_us),
                connection: self.describe(connection),
                on_the_way: self.ends(connection).contains(&Stands::OnTheWay),
            })
            .collect()
    }

    /// What is to be in the access logs.
    pub fn expected(&self) -> Vec<Expected> {
        let all = self.records.connections.iter();
        all.filter_map(|connection| {
            let failed = connection.broken.is_some();
            let entries = self.ends(connection).map(|stands| match stands {
                // What failed may have done so before it came to a proxy.
                _ if failed => Wanted::OneAtMost,
                Stands::Inside => Wanted::One,
                Stands::OnTheWay => Wanted::OneAtMost,
                Stands::Outside => Wanted::None,
            });
            Some(Expected {
                from: self.local(connection)?,
                to: self.address(&connection.to)?,
                entries,
            })
        })
        .collect()
    }

    /// Judges the packets in the clear: those of a connection that was opened inside the mesh count, whenever they pass.
    pub fn packets(&self) -> Packets {
        let pods = self.pods();
        let mut by_tuple: BTreeMap<(IpAddr, u16, IpAddr), Vec<&Connection>> = BTreeMap::new();
        for connection in &self.records.connections {
            if let (Some(local), Some(to)) = (self.local(connection), self.address(&connection.to))
            {
                let tuple = (local.ip(), local.port(), to);
                by_tuple.entry(tuple).or_default().push(connection);
            }
        }
        let is_outside = |flow: &Flow, first_us: u64| {
            let tuple = (
                flow.from.ip().to_owned().into(),
                flow.from.port(),
                flow.to.ip().to_owned().into(),
            );
            // A port that came again: the last connection that had begun by then.
            let known = by_tuple.get(&tuple).and_then(|ones| {
                let begun = ones
                    .iter()
                    .rev()
                    .find(|one| one.begun_us <= first_us + 1_000);
                begun.or(ones.first())
            });
            if let Some(connection) = known {
                return self.is_outside(connection);
            }
            // A proxy's own, in the clear because the other pod is outside.
            let ends = [tuple.0, tuple.2].map(|ip| pods.get(&ip).copied());
            ends.into_iter()
                .flatten()
                .any(|pod| self.stood(pod, first_us, first_us) != Stands::Inside)
        };
        let mut packets = Packets::default();
        for (device, place, heard) in self.heard {
            let mut seen = DeviceSeen {
                device: device.clone(),
                place: *place,
                packets: heard.packets,
                tunnel: heard.tunnel,
                clear: heard.beyond,
                outside: 0,
                missed: heard.missed,
            };
            let mut kept = 0;
            for (flow, clear) in &heard.clear {
                let ends = [*flow.from.ip(), *flow.to.ip()];
                if !ends.iter().any(|ip| pods.contains_key(&IpAddr::from(*ip))) {
                    continue;
                }
                let outside = is_outside(flow, clear.first_us);
                *(if outside {
                    &mut seen.outside
                } else {
                    &mut seen.clear
                }) += clear.packets;
                if !outside || kept < MOST_CLEAR {
                    kept += 1;
                    packets.clear.push(ClearSeen {
                        device: device.clone(),
                        flow: *flow,
                        packets: clear.packets,
                        first_seconds: self.seconds(clear.first_us),
                        last_seconds: self.seconds(clear.last_us),
                        outside,
                    });
                }
            }
            packets.devices.push(seen);
        }
        packets
    }

    /// What went wrong on connections, in the order in which it did.
    pub fn errors(&self) -> Vec<ErrorSeen> {
        let by_id: BTreeMap<u64, &Connection> = self
            .records
            .connections
            .iter()
            .map(|connection| (connection.id, connection))
            .collect();
        let error = |id: u64, by: &str, broken: &Broken| {
            let connection = by_id.get(&id);
            ErrorSeen {
                at_seconds: self.seconds(broken.at_us),
                begun_seconds: connection.map(|one| self.seconds(one.begun_us)),
                kind: connection.map(|one| one.kind),
                id,
                connection: connection.map_or_else(String::new, |one| self.describe(one)),
                by: by.to_owned(),
                saw: broken.saw,
                what: broken.what.clone(),
            }
        };
        let clients = self.records.connections.iter();
        let mut errors: Vec<ErrorSeen> = clients
            .filter_map(|one| Some(error(one.id, &one.from, one.broken.as_ref()?)))
            .collect();
        let served = self.records.served.iter();
        errors.extend(served.map(|one| error(one.id, &one.by, &one.broken)));
        errors.sort_by(|a, b| a.at_seconds.total_cmp(&b.at_seconds));
        errors.truncate(MOST_ERRORS);
        errors
    }

    /// The connections in numbers.
    pub fn load(&self) -> LoadSeen {
        let all = &self.records.connections;
        let count = |kind: Kind| all.iter().filter(|one| one.kind == kind).count() as u64;
        let mut took: Vec<u64> = all
            .iter()
            .filter(|one| one.kind == Kind::New)
            .filter_map(|one| one.took_us)
            .collect();
        took.sort_unstable();
        let standing = all.iter().filter(|one| one.kind != Kind::New);
        let stall = standing.map(|one| one.worst_us).max().unwrap_or_default();
        LoadSeen {
            busy: count(Kind::Busy),
            idle: count(Kind::Idle),
            new: count(Kind::New),
            new_late: self.records.late,
            messages: all.iter().map(|one| one.messages).sum(),
            new_p50_ms: percentile(&took, 0.5),
            new_p99_ms: percentile(&took, 0.99),
            new_p999_ms: percentile(&took, 0.999),
            new_max_ms: percentile(&took, 1.0),
            stall_max_ms: stall as f64 / 1e3,
        }
    }

    /// Everything that is measured, with what has to be so.
    pub fn judge(&self, access: &Verdict, packets: &Packets, errors: &[ErrorSeen]) -> Vec<Judged> {
        let wanted = &self.experiment.assertions;
        let mut all = vec![self.failed_steps(), self.unrecorded()];
        all.extend(self.connections(wanted, errors));
        let deviations = |least: bool| {
            let beyond = access.deviations.iter().filter(move |one| {
                if least {
                    one.entries < one.least
                } else {
                    one.entries > one.most
                }
            });
            beyond.map(|one| {
                format!(
                    "{}: {} entries of {} to {}",
                    one.what, one.entries, one.least, one.most
                )
            })
        };
        all.push(judged(
            "doubleCaptures",
            access.doubles,
            wanted.double_captures,
            deviations(false),
        ));
        all.push(judged(
            "uncaptured",
            access.missing,
            wanted.uncaptured,
            deviations(true),
        ));
        let repeated = access.repeated.iter();
        let evidence = repeated.map(|(error, count)| format!("{count} times: {error}"));
        let count = access.repeated.values().sum();
        all.push(judged("repeated", count, wanted.repeated, evidence));
        all.push(self.clear(wanted, packets));
        all.extend(self.times(wanted));
        all
    }

    fn failed_steps(&self) -> Judged {
        let failed = self.steps.iter().filter(|step| step.error.is_some());
        let evidence = failed.clone().map(|step| {
            let error = step.error.as_deref().unwrap_or_default();
            format!("step {}, {}: {error}", step.step, step.what)
        });
        judged("failedSteps", failed.count() as u64, Some(0), evidence)
    }

    /// A long-lived connection without a record is one that nothing is known of.
    fn unrecorded(&self) -> Judged {
        let ordered = u64::from(self.experiment.load.long_lived.connections);
        let all = self.records.connections.iter();
        let recorded = all.filter(|one| one.kind != Kind::New).count() as u64;
        judged("unrecorded", ordered.saturating_sub(recorded), Some(0), [])
    }

    fn connections(&self, wanted: &Assertions, errors: &[ErrorSeen]) -> Vec<Judged> {
        let records = self.records;
        let of_clients = records
            .connections
            .iter()
            .filter_map(|one| Some((one.id, one.broken.as_ref()?)));
        let of_servers = records.served.iter().map(|one| (one.id, &one.broken));
        let broken: Vec<(u64, &Broken)> = of_clients.chain(of_servers).collect();
        let ids = |wrong: bool| -> BTreeSet<u64> {
            let ones = broken
                .iter()
                .filter(|(_, broken)| (broken.saw == Saw::WrongData) == wrong);
            ones.map(|(id, _)| *id).collect()
        };
        // Whoever hears a wrong byte ends the connection: that is not counted again.
        let wrong = ids(true);
        let lost: BTreeSet<u64> = ids(false).difference(&wrong).copied().collect();
        let kinds = |ids: &BTreeSet<u64>, kinds: &[Kind]| -> BTreeSet<u64> {
            let of = records
                .connections
                .iter()
                .filter(|one| kinds.contains(&one.kind));
            of.map(|one| one.id).filter(|id| ids.contains(id)).collect()
        };
        let resets = kinds(&lost, &[Kind::Busy, Kind::Idle]);
        let failed = kinds(&lost, &[Kind::New]);
        let evidence = |ids: &BTreeSet<u64>| -> Vec<String> {
            let ones = errors.iter().filter(|error| ids.contains(&error.id));
            ones.take(MOST_EVIDENCE)
                .map(|error| {
                    let begun = error
                        .begun_seconds
                        .map_or_else(String::new, |begun| format!(", begun {begun:.2} s"));
                    format!(
                        "{:.3} s: {}{begun}, says {}: {}",
                        error.at_seconds, error.connection, error.by, error.what
                    )
                })
                .collect()
        };
        let count = |ids: &BTreeSet<u64>| ids.len() as u64;
        let mut all = vec![
            judged("resets", count(&resets), wanted.resets, evidence(&resets)),
            judged(
                "wrongBytes",
                count(&wrong),
                wanted.wrong_bytes,
                evidence(&wrong),
            ),
            judged(
                "failedNew",
                count(&failed),
                wanted.failed_new,
                evidence(&failed),
            ),
        ];
        if let Some(end) = wanted.failed_at_end {
            let from = self.ended_us.saturating_sub((end.seconds * 1e6) as u64);
            let late = records
                .connections
                .iter()
                .filter(|one| one.begun_us >= from);
            let late: BTreeSet<u64> = late
                .map(|one| one.id)
                .filter(|id| failed.contains(id))
                .collect();
            all.push(judged(
                "failedAtEnd",
                count(&late),
                Some(end.at_most),
                evidence(&late),
            ));
        }
        all
    }

    fn clear(&self, wanted: &Assertions, packets: &Packets) -> Judged {
        let count = packets.devices.iter().map(|device| device.clear).sum();
        let clear = packets.clear.iter().filter(|clear| !clear.outside);
        let mut evidence: Vec<String> = clear
            .take(MOST_EVIDENCE)
            .map(|clear| {
                format!(
                    "{}: {} packets of {} to {}, first at {:.3} s, last at {:.3} s",
                    clear.device,
                    clear.packets,
                    clear.flow.from,
                    clear.flow.to,
                    clear.first_seconds,
                    clear.last_seconds
                )
            })
            .collect();
        let missed = packets.devices.iter().filter(|device| device.missed > 0);
        let deaf: Vec<String> = missed
            .map(|device| {
                format!(
                    "{}: {} packets were not heard",
                    device.device, device.missed
                )
            })
            .collect();
        let mut verdict = judged("clearPackets", count, wanted.clear_packets, []);
        // Nothing can be said of packets that nobody heard.
        verdict.holds &= wanted.clear_packets.is_none() || deaf.is_empty();
        evidence.extend(deaf);
        verdict.evidence = evidence;
        verdict
    }

    fn times(&self, wanted: &Assertions) -> Vec<Judged> {
        let over = long_us(wanted);
        let new = || {
            self.records
                .connections
                .iter()
                .filter(|one| one.kind == Kind::New)
        };
        let slow = || new().filter(|one| one.took_us.is_some_and(|took| took > over));
        let share = slow().count() as f64 / (new().count().max(1)) as f64;
        let evidence = slow().take(MOST_EVIDENCE).map(|one| {
            format!(
                "{:.3} s: {} took {:.0} ms",
                self.seconds(one.begun_us),
                self.describe(one),
                one.took_us.unwrap_or_default() as f64 / 1e3
            )
        });
        let limit = wanted.delayed.map(|delayed| delayed.share);
        let mut all = vec![at_most("delayed", share, limit, evidence)];
        let switches = self.steps.iter().flat_map(|step| &step.switches);
        let mut held: Vec<f64> = switches.filter_map(|one| one.held_ms).collect();
        held.sort_by(f64::total_cmp);
        if let Some(median) = held.get(held.len().saturating_sub(1) / 2) {
            let shown: Vec<String> = held.iter().map(|ms| format!("{ms:.0}")).collect();
            let evidence = format!("{} switches: {} ms", held.len(), shown.join(", "));
            all.push(at_most(
                "heldMedianMs",
                *median,
                wanted.held_median_ms,
                [evidence],
            ));
        } else if let Some(limit) = wanted.held_median_ms {
            // Without a switch there is nothing that could have been held.
            let mut none = at_most("heldMedianMs", 0.0, Some(limit), ["no switch".to_owned()]);
            none.holds = false;
            all.push(none);
        }
        all
    }
}

fn judged(
    assertion: &str,
    measured: u64,
    limit: Option<u64>,
    evidence: impl IntoIterator<Item = String>,
) -> Judged {
    at_most(
        assertion,
        measured as f64,
        limit.map(|limit| limit as f64),
        evidence,
    )
}

fn at_most(
    assertion: &str,
    measured: f64,
    limit: Option<f64>,
    evidence: impl IntoIterator<Item = String>,
) -> Judged {
    Judged {
        assertion: assertion.to_owned(),
        measured,
        limit,
        holds: limit.is_none_or(|limit| measured <= limit),
        evidence: evidence.into_iter().take(MOST_EVIDENCE).collect(),
    }
}
