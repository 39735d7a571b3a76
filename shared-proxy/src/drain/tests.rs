#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::time::Instant;

use super::*;

#[tokio::test]
async fn holders_that_finish_end_the_drain_before_its_deadline() {
    let drainer = Drainer::new();
    let signal = drainer.signal();
    let task = tokio::spawn(async move {
        signal.draining().await;
        assert_eq!(signal.phase(), Phase::Draining);
    });
    let started = Instant::now();
    drainer.run(Drain::within(Duration::from_secs(60))).await;
    assert!(started.elapsed() < Duration::from_secs(30));
    task.await.unwrap();
}

#[tokio::test]
async fn holders_that_do_not_finish_are_cut_at_the_deadline() {
    let drainer = Drainer::new();
    let signal = drainer.signal();
    let task = tokio::spawn(async move {
        signal.draining().await;
        let asked = Instant::now();
        signal.cut().await;
        asked.elapsed()
    });
    drainer.run(Drain::within(Duration::from_millis(80))).await;
    assert!(task.await.unwrap() >= Duration::from_millis(70));
}

#[tokio::test]
async fn a_cut_does_not_ask_first() {
    let drainer = Drainer::new();
    let signal = drainer.signal();
    let task = tokio::spawn(async move {
        signal.draining().await;
        signal.phase()
    });
    drainer.run(Drain::CUT).await;
    assert_eq!(task.await.unwrap(), Phase::Cut);
}

#[tokio::test]
async fn a_late_signal_is_in_the_phase_of_its_drainer() {
    let drainer = Drainer::new();
    let first = drainer.signal();
    drainer.drain();
    assert_eq!(first.clone().phase(), Phase::Draining);
    assert_eq!(drainer.signal().phase(), Phase::Draining);
}

#[tokio::test]
async fn a_cutter_ends_one_and_no_other() {
    let drainer = Drainer::new();
    let (one, other) = (drainer.signal(), drainer.signal());
    one.cutter().cut();
    one.cut().await;
    assert_eq!(other.phase(), Phase::Open);
    drop(one);
    assert_eq!(drainer.members(), 1);
}
