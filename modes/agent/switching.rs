//! A running pod changes its capture, and its connections do not notice.
//!
//! The proxy holds the pod: what is open goes on, what begins waits. Meanwhile the kernel gets the objects of the capture
//! to be, loses what the other one redirects with, and the proxy dials for the pod by the new capture when it lets go. What
//! came by the capture that the pod had keeps what carries it until its last connection has ended.
//!
//! The pod's entry says what an agent that starts in the middle has to make of it: until the kernel has all, the pod's
//! capture is the one that it had, and the other one is leaving; afterwards it is the other way round.

mod steps;

use std::time::Duration;

use anyhow::{Context, anyhow, ensure};
use host_net::plan::{Phase, Place, Plan};
use http::StatusCode;
use inpod_redirect::zds::server::{ConnectionId, ZdsError};
use inpod_redirect::zds::{Delays, Release};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, timeout};

use super::draining::{RESETS_WITHIN, now};
use super::enrol::CONFIRM_WITHIN;
use super::ledger::{Delay, Ledger, Outcome};
use super::plans::announcement;
use super::pods::Leaving;
use super::timings::micros;
use super::{Agent, NotFound, Pod, PodState};
use crate::options::{Capture, InpodRules, NodeFlow};
use crate::unix_http::Answer;
use steps::Step;

/// How long the proxy may hold a pod: less than a client waits that sends its first packet again, so an agent that is lost
/// costs nobody his connection. The agent renews it while it goes on.
const HELD_WITHIN: Duration = Duration::from_secs(3);

/// What is said of a pod whose capture has changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Switched {
    /// `namespace/name`.
    pub pod: String,
    /// The capture that it had.
    pub from: Capture,
    /// The capture that it has.
    pub to: Capture,
    /// Connections that go on by the capture that it had.
    pub through: usize,
    /// For so many seconds at most.
    pub seconds: u64,
    /// How long connections waited at most that began meanwhile, in microseconds.
    pub held_us: u64,
    /// What became of which connection.
    pub ledger: Ledger,
}

/// Answers `POST /v1/capture?pod=P&to=node|inpod`, `&drain=SECONDS`, and `&connections` for each of them.
pub(super) async fn switch(agent: &Agent, query: &str) -> Answer {
    let mut wanted = (None, None);
    let mut each = false;
    let mut within = agent.config.drain;
    for part in query.split('&') {
        match part.split_once('=') {
            Some(("pod", pod)) => wanted.0 = Some(pod),
            Some(("to", to)) => wanted.1 = to.parse::<Capture>().ok(),
            Some(("drain", seconds)) => match seconds.parse::<u32>() {
                Ok(seconds) => within = Duration::from_secs(seconds.into()),
                Err(_) => wanted = (None, None),
            },
            None if part == "connections" => each = true,
            _ => wanted = (None, None),
        }
    }
    let (Some(pod), Some(to)) = wanted else {
        return Answer::text(
            StatusCode::BAD_REQUEST,
            "say ?pod=NAMESPACE/NAME&to=node or &to=inpod, and &drain=SECONDS for another time than the agent's own\n",
        );
    };
    let pod = match agent.pods.find(pod) {
        Ok(pod) => pod,
        Err(error @ NotFound::Unknown(_)) => {
            return Answer::text(StatusCode::NOT_FOUND, format!("{error}\n"));
        }
        Err(error) => return Answer::text(StatusCode::BAD_REQUEST, format!("{error}\n")),
    };
    match agent.switch_capture(&pod.uid, to, within).await {
        Ok(mut switched) => {
            if !each {
                switched.ledger.connections.clear();
            }
            Answer::json(&switched)
        }
        Err(error) => Answer::text(
            StatusCode::CONFLICT,
            format!("pod {}: {error:#}\n", pod.qualified_name()),
        ),
    }
}

/// Answers `GET /v1/ledger?pod=P`, and `&connections`.
pub(super) fn ledger(agent: &Agent, query: &str) -> Answer {
    let (pod, each) = match query.split_once('&') {
        None => (query, false),
        Some((pod, "connections")) => (pod, true),
        Some(_) => ("", false),
    };
    let Some(wanted) = pod.strip_prefix("pod=").filter(|pod| !pod.is_empty()) else {
        let text = "say ?pod=NAMESPACE/NAME, and &connections for each of them\n";
        return Answer::text(StatusCode::BAD_REQUEST, text);
    };
    let mut ledgers = agent.ledgers.of(wanted);
    if ledgers.is_empty()
        && let Err(error) = agent.pods.find(wanted)
    {
        return Answer::text(StatusCode::NOT_FOUND, format!("{error}\n"));
    }
    if !each {
        for ledger in &mut ledgers {
            ledger.connections.clear();
        }
    }
    Answer::json(&ledgers)
}

impl Agent {
    /// Gives a running pod another capture. What came by the one that it has goes on for up to `within`.
    ///
    /// # Errors
    /// The pod has the capture that it had: nothing was changed, or everything was taken back.
    pub(super) async fn switch_capture(
        &self,
        uid: &str,
        to: Capture,
        within: Duration,
    ) -> anyhow::Result<Switched> {
        let _alone = self.busy.lock(uid).await;
        let pod = self
            .pods
            .get(uid)
            .filter(|pod| pod.state == PodState::Captured)
            .ok_or_else(|| anyhow!("the pod is not captured"))?;
        ensure!(pod.mode != to, "it is captured by {to} already");
        self.refuse_switch(&pod)?;
        let until = now().saturating_add(within.as_secs());
        let leaving = |capture| Some(Leaving { capture, until });
        // It is running, whatever it was when it was enrolled, and has connections that are older than the capture to be.
        let before = Pod {
            live: true,
            settled: false,
            leaving: leaving(to),
            ..pod.clone()
        };
        let after = Pod {
            mode: to,
            leaving: leaving(pod.mode),
            ..before.clone()
        };
        let ledger = Ledger::begun(&pod, pod.mode.into(), to.into());
        let earlier = self.earlier(&pod);
        self.pods.put(before.clone())?;
        let begun = Instant::now();
        let delays = match self.change(&before, &after, within).await {
            Ok(delays) => delays,
            Err(error) => {
                let delays = self.stay(&before).await;
                self.ledgers.add(Ledger {
                    result: Outcome::Failed,
                    reason: format!("{error:#}"),
                    held_us: micros(begun.elapsed()),
                    delayed: (&delays).into(),
                    over: true,
                    ..ledger
                });
                return Err(error);
            }
        };
        let held = begun.elapsed();
        // The pod may be gone by this moment; it was changed all the same.
        let lines = self.lines(&after, Some(pod.mode), Some(to), &earlier, &delays);
        let ledger = Ledger {
            held_us: micros(held),
            delayed: (&delays).into(),
            until: Some(until),
            ..ledger.with(lines.unwrap_or_default())
        };
        self.ledgers.add(ledger.clone());
        let key = awaited(&after, pod.mode);
        self.awaited.forget(&key);
        let ends = self.proxy_ends_by(&after, pod.mode)?;
        let through = ledger.open;
        self.awaited.left(&key, ends.into_iter().collect());
        let name = pod.qualified_name();
        tracing::info!(pod = name, from = %pod.mode, to = %to, through, held = ?held, "pod has another capture");
        Ok(Switched {
            pod: name,
            from: pod.mode,
            to,
            through,
            seconds: within.as_secs(),
            held_us: ledger.held_us,
            ledger,
        })
    }

    /// Why no pod of this node can change its capture.
    fn refuse_switch(&self, pod: &Pod) -> anyhow::Result<()> {
        ensure!(
            self.config.mode.uses_node() && self.config.mode.uses_inpod(),
            "this node has {} capture alone: start its agent with --mode mixed",
            self.config.mode
        );
        ensure!(
            self.config.variant.node_flow == NodeFlow::Hybrid,
            "with --node-flow {} a pod's open connections would not survive: start the agent with --node-flow hybrid",
            self.config.variant.node_flow
        );
        ensure!(
            self.config.variant.inpod_rules == InpodRules::Redirect,
            "with --inpod-rules {} a pod's open connections might not survive: start the agent with --inpod-rules redirect",
            self.config.variant.inpod_rules
        );
        ensure!(
            self.closings.finding(&pod.uid).is_none(),
            "its traffic is stopped because its capture cannot be put back: mend that first (`ambidex verify`)"
        );
        Ok(())
    }

    async fn change(&self, before: &Pod, after: &Pod, within: Duration) -> anyhow::Result<Delays> {
        let (from, to) = (before.mode, after.mode);
        let both = [(from, Phase::Active), (to, Phase::Active)];
        let both = self.plans_in(after, &both).await?;
        self.read_ahead(&both).await;
        let (in_pod, elsewhere) = by_place(both);
        Step::Hold.comes().await?;
        let mut held = Held::begin(self, &before.uid).await?;
        held.until(Step::Prepare).await?;
        answered(self.zds.prepare(announcement(after)?, held.by))
            .await
            .context("the proxy cannot serve it by the other capture")?;
        // On the node first: what leads the proxy's own connections past the node's capture is there before they are made.
        for (step, plans) in [(Step::NodeObjects, elsewhere), (Step::PodObjects, in_pod)] {
            held.until(step).await?;
            for (place, plan) in plans {
                self.converge(&place, &plan).await?;
            }
        }
        let one = [(from, Phase::Draining), (to, Phase::Active)];
        let (in_pod, elsewhere) = by_place(self.plans_in(after, &one).await?);
        held.until(Step::Exclusive).await?;
        for (place, plan) in in_pod.into_iter().chain(elsewhere) {
            self.converge(&place, &plan).await?;
        }
        // Whether the pod is held still or not: in one capture it is, and the way back would be through both.
        Step::Flip.comes().await?;
        self.pods.put(after.clone())?;
        Step::Release.comes().await?;
        let release = Release::Changes { drain: within };
        // Whatever it answers: the kernel has the pod captured by the other one, and every proxy hears of that.
        let error = match answered(self.zds.release(announcement(after)?, release)).await {
            Ok(delays) => return Ok(delays),
            Err(error) => format!("{error:#}"),
        };
        tracing::warn!(
            pod = after.qualified_name(),
            error,
            "the proxy did not confirm a change of capture"
        );
        self.tell_anew(after).await;
        Ok(Delays::default())
    }

    /// Takes back what was done of a change, and says what had to wait for that.
    async fn stay(&self, before: &Pod) -> Delays {
        let name = before.qualified_name();
        if let Err(error) = self.pods.put(before.clone()) {
            tracing::error!(pod = name, %error, "that a pod keeps its capture is not on disk");
        }
        if let Err(error) = self.make_redirect(before).await {
            tracing::error!(
                pod = name,
                error = format!("{error:#}"),
                "a pod's capture was not put back; it is looked after"
            );
        }
        let Ok(add) = announcement(before) else {
            return Delays::default();
        };
        match answered(self.zds.release(add, Release::Stays)).await {
            Ok(delays) => delays,
            Err(error) => {
                let error = format!("{error:#}");
                tracing::warn!(
                    pod = name,
                    error,
                    "the proxy did not confirm that a pod keeps its capture"
                );
                self.tell_anew(before).await;
                Delays::default()
            }
        }
    }

    /// Tells a proxy that knows nothing of a change, because it is another one, which capture the pod has.
    async fn tell_anew(&self, pod: &Pod) {
        let Ok(add) = announcement(pod) else {
            return;
        };
        if let Err(error) = answered(self.zds.add(add)).await {
            let (name, error) = (pod.qualified_name(), format!("{error:#}"));
            tracing::warn!(
                pod = name,
                error,
                "a proxy that connects hears which capture a pod has"
            );
        }
    }

    /// Takes away what is left of captures that pods had, once nothing goes by them any more.
    pub(super) async fn end_left_captures(&self) {
        let left = |pod: &Pod| pod.state == PodState::Captured && pod.leaving.is_some();
        for pod in self.pods.all().into_iter().filter(left) {
            if let Err(error) = self.end_left_capture(&pod).await {
                tracing::error!(
                    pod = pod.qualified_name(),
                    error = format!("{error:#}"),
                    "a capture that a pod had left something behind"
                );
            }
        }
    }

    async fn end_left_capture(&self, pod: &Pod) -> anyhow::Result<()> {
        let Some(leaving) = pod.leaving else {
            return Ok(());
        };
        let key = awaited(pod, leaving.capture);
        self.look_at_kept(pod);
        // Where the kernel cannot be asked, the time decides.
        let left = self
            .proxy_ends_by(pod, leaving.capture)
            .ok()
            .map(|ends| self.awaited.left(&key, ends.into_iter().collect()));
        let over = now() >= leaving.until.saturating_add(RESETS_WITHIN.as_secs());
        if left != Some(0) && !over {
            return Ok(());
        }
        let _alone = self.busy.lock(&pod.uid).await;
        // Whoever changed it anew meanwhile has changed its entry.
        if self.pods.get(&pod.uid).as_ref() != Some(pod) {
            return Ok(());
        }
        Step::DrainEnd.comes().await?;
        let phases = [(pod.mode, Phase::Active), (leaving.capture, Phase::Absent)];
        for (place, plan) in self.plans_in(pod, &phases).await? {
            self.converge(&place, &plan).await?;
        }
        self.pods.put(Pod {
            leaving: None,
            ..pod.clone()
        })?;
        self.awaited.forget(&key);
        self.ledgers.end(&pod.uid);
        tracing::info!(
            pod = pod.qualified_name(),
            capture = %leaving.capture,
            cut = left.unwrap_or_default(),
            "nothing of the capture that a pod had is left"
        );
        Ok(())
    }
}

/// What the proxy answers, if it does so soon: one that is just connecting may wait for this pod.
async fn answered<T>(asked: impl Future<Output = Result<T, ZdsError>>) -> anyhow::Result<T> {
    timeout(CONFIRM_WITHIN, asked)
        .await
        .map_err(|_| anyhow!("the proxy did not answer within {CONFIRM_WITHIN:?}"))?
        .map_err(Into::into)
}

/// A pod that the proxy holds, and is to go on holding.
struct Held<'a> {
    agent: &'a Agent,
    uid: &'a str,
    /// Which proxy holds it.
    by: ConnectionId,
    since: Instant,
}

impl<'a> Held<'a> {
    async fn begin(agent: &'a Agent, uid: &'a str) -> anyhow::Result<Self> {
        let since = Instant::now();
        let by = answered(agent.zds.hold(uid, HELD_WITHIN)).await?;
        Ok(Self {
            agent,
            uid,
            by,
            since,
        })
    }

    /// The change comes to a step for which the pod must be held.
    ///
    /// # Errors
    /// It is not any more: what it began meanwhile may have come by two captures.
    async fn until(&mut self, step: Step) -> anyhow::Result<()> {
        step.comes().await?;
        let age = self.since.elapsed();
        ensure!(
            age < HELD_WITHIN,
            "{step:?}: it came {age:?} after the proxy began to hold the pod, which it does for {HELD_WITHIN:?}"
        );
        if age >= HELD_WITHIN / 4 {
            let renewed = Self::begin(self.agent, self.uid).await?;
            ensure!(renewed.by == self.by, "another proxy has connected");
            *self = renewed;
        }
        Ok(())
    }
}

/// Plans of a pod's own namespace, and others.
type Placed = Vec<(Place, Plan)>;

fn by_place(plans: Placed) -> (Placed, Placed) {
    plans.into_iter().partition(|(_, plan)| is_in_pod(plan))
}

impl From<&Delays> for Delay {
    fn from(delays: &Delays) -> Self {
        Self {
            count: delays.count,
            median_us: micros(delays.median),
            longest_us: micros(delays.longest),
        }
    }
}

/// Under which name the connections of a capture that a pod had are waited for.
fn awaited(pod: &Pod, capture: Capture) -> String {
    format!("{} {capture}", pod.uid)
}

/// Whether a plan is about the pod's own namespace.
fn is_in_pod(plan: &Plan) -> bool {
    plan.name.starts_with("pod-")
}
