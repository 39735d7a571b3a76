//! The process dies at any moment: the journal alone is enough to get back to the state before.

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use host_net::engine::{apply, remove, undo};
use host_net::iptables::Variant;
use host_net::journal::Journal;
use host_net::netns::Netns;
use host_net::plan::{Place, Plan};

use crate::plans::{node, node_draining};
use crate::stage::Stage;

async fn cut_after_each_step(variant: Variant, bare: bool) {
    let stage = if bare {
        Stage::bare(variant)
    } else {
        Stage::new(variant)
    };
    let before = stage.state().await;
    let plan = node();
    let empty = Plan::empty(&plan.name);
    // What the journal holds from the first moment on.
    apply(&stage.place, &empty, &plan, &stage.journal)
        .await
        .unwrap();
    let record = stage.journal.load(&plan.name).unwrap().unwrap();
    assert!(remove(&stage.place, &plan, &stage.journal).await.is_empty());

    let elsewhere = tempfile::tempdir().unwrap();
    for made in 0..=plan.steps.len() {
        let begun = Plan {
            name: plan.name.clone(),
            steps: plan.steps[..made].to_vec(),
        };
        let unknown = Journal::open(elsewhere.path().join(made.to_string())).unwrap();
        // A chain that refers to a later one cannot be made alone; then nothing was.
        let _ = apply(&stage.place, &empty, &begun, &unknown).await;
        stage.journal.store(&record).unwrap();
        let errors = undo(&plan.name, None, &stage.journal).await;
        assert!(errors.is_empty(), "after {made} steps: {errors:?}");
        assert_eq!(stage.state().await, before, "after {made} steps");
        assert_eq!(stage.journal.list().unwrap(), [""; 0]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn cut_after_each_step_nft() {
    cut_after_each_step(Variant::Nft, true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cut_after_each_step_legacy() {
    cut_after_each_step(Variant::Legacy, false).await;
}

const STATE_VARIABLE: &str = "AMBIDEX_TEST_CRASH_JOURNAL";
const NETNS_VARIABLE: &str = "AMBIDEX_TEST_CRASH_NETNS";

/// The process that gets killed: not a test of its own, does nothing when run as one.
#[tokio::test(flavor = "multi_thread")]
async fn child_that_moves_to_and_fro() {
    let (Some(dir), Some(path)) = (
        std::env::var_os(STATE_VARIABLE),
        std::env::var_os(NETNS_VARIABLE),
    ) else {
        return;
    };
    let journal = Journal::open(dir).unwrap();
    let place = Place {
        label: "child".to_owned(),
        netns: Netns::open(path).unwrap(),
    };
    let states = [node(), node_draining(), node(), Plan::empty(&node().name)];
    let mut from = Plan::empty(&node().name);
    // Far longer than it lives; bounded in case nobody kills it.
    for to in states.iter().cycle().take(400) {
        apply(&place, &from, to, &journal).await.unwrap();
        from = to.clone();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_random_moments() {
    let stage = Stage::bare(Variant::Nft);
    let before = stage.state().await;
    let mut cut_in_the_middle = 0;
    for round in 0..16_u64 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "crash::child_that_moves_to_and_fro"])
            .env(STATE_VARIABLE, stage.journal_dir())
            .env(NETNS_VARIABLE, Netns::path_of(stage.netns_name()))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        tokio::time::sleep(Duration::from_millis(40 + round * 23)).await;
        child.kill().unwrap();
        let status = child.wait().unwrap();
        assert_eq!(status.signal(), Some(9), "it ended by itself");
        // A restore that the child had started may outlive it.
        stage.wait_for_iptables().await;
        cut_in_the_middle += usize::from(stage.state().await != before);
        let errors = undo(&node().name, None, &stage.journal).await;
        assert!(errors.is_empty(), "round {round}: {errors:?}");
        assert_eq!(stage.state().await, before, "round {round}");
    }
    assert!(
        cut_in_the_middle >= 4,
        "only {cut_in_the_middle} of 16 kills hit"
    );
}
