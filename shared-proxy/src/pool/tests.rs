#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};

use futures_util::future::join_all;

use super::*;

#[derive(Debug, Clone)]
struct Fake {
    number: usize,
    open: Arc<AtomicBool>,
    limit: usize,
}

impl Multiplexed for Fake {
    fn is_open(&self) -> bool {
        self.open.load(SeqCst)
    }

    fn stream_limit(&self) -> usize {
        self.limit
    }
}

/// Makes connections slowly, and counts them.
#[derive(Default)]
struct Maker {
    made: AtomicUsize,
    at_once: AtomicUsize,
    most_at_once: AtomicUsize,
    fails: AtomicBool,
}

impl Maker {
    fn connect(
        self: &Arc<Self>,
    ) -> impl Fn() -> std::pin::Pin<Box<dyn Future<Output = Result<Fake, String>> + Send>> {
        let maker = self.clone();
        move || {
            let maker = maker.clone();
            Box::pin(async move {
                let at_once = maker.at_once.fetch_add(1, SeqCst) + 1;
                maker.most_at_once.fetch_max(at_once, SeqCst);
                tokio::time::sleep(Duration::from_millis(10)).await;
                maker.at_once.fetch_sub(1, SeqCst);
                let number = maker.made.fetch_add(1, SeqCst) + 1;
                if maker.fails.load(SeqCst) {
                    return Err(format!("attempt {number} failed"));
                }
                Ok(Fake {
                    number,
                    open: Arc::new(AtomicBool::new(true)),
                    limit: 1000,
                })
            })
        }
    }
}

fn pool(
    max_streams_per_connection: usize,
    idle_release: Duration,
) -> Pool<&'static str, Fake, String> {
    Pool::new(PoolConfig {
        max_streams_per_connection,
        idle_release,
    })
}

const LONG: Duration = Duration::from_secs(3600);

#[tokio::test]
async fn many_callers_share_one_connect_and_full_connections_get_company() {
    let (pool, maker) = (pool(10, LONG), Arc::new(Maker::default()));
    let leases = join_all((0..35).map(|_| pool.lease(&"a", maker.connect()))).await;
    let leases: Vec<_> = leases.into_iter().map(Result::unwrap).collect();
    assert_eq!(maker.made.load(SeqCst), 4);
    assert_eq!(maker.most_at_once.load(SeqCst), 1);
    let mut streams = [0; 5];
    for lease in &leases {
        streams[lease.connection().number] += 1;
    }
    assert_eq!(streams, [0, 10, 10, 10, 5]);
    drop(leases);
    let again = pool.lease(&"a", maker.connect()).await.unwrap();
    assert!(!again.is_fresh());
    assert_eq!(maker.made.load(SeqCst), 4);
}

#[tokio::test]
async fn keys_do_not_share() {
    let (pool, maker) = (pool(10, LONG), Arc::new(Maker::default()));
    let one = pool.lease(&"a", maker.connect()).await.unwrap();
    let other = pool.lease(&"b", maker.connect()).await.unwrap();
    assert_ne!(one.connection().number, other.connection().number);
}

#[tokio::test]
async fn all_who_wait_share_a_failure_and_the_next_one_tries_again() {
    let (pool, maker) = (pool(10, LONG), Arc::new(Maker::default()));
    maker.fails.store(true, SeqCst);
    let results = join_all((0..20).map(|_| pool.lease(&"a", maker.connect()))).await;
    for result in results {
        assert_eq!(*result.unwrap_err().unwrap(), "attempt 1 failed");
    }
    maker.fails.store(false, SeqCst);
    pool.lease(&"a", maker.connect()).await.unwrap();
}

#[tokio::test]
async fn a_connect_that_panics_blocks_nobody() {
    let (pool, maker) = (pool(10, LONG), Arc::new(Maker::default()));
    let panics = || async { panic!("on purpose") };
    assert!(pool.lease(&"a", panics).await.unwrap_err().is_none());
    pool.lease(&"a", maker.connect()).await.unwrap();
}

#[tokio::test]
async fn a_caller_that_gives_up_does_not_stop_the_connect_of_the_others() {
    let (pool, maker) = (pool(10, LONG), Arc::new(Maker::default()));
    let connect = maker.connect();
    let impatient = tokio::time::timeout(Duration::from_millis(1), pool.lease(&"a", &connect));
    assert!(impatient.await.is_err());
    pool.lease(&"a", &connect).await.unwrap();
    assert_eq!(maker.made.load(SeqCst), 1);
}

#[tokio::test]
async fn a_closed_connection_leaves_and_a_refusing_one_is_replaced() {
    let (pool, maker) = (pool(10, LONG), Arc::new(Maker::default()));
    let first = pool.lease(&"a", maker.connect()).await.unwrap();
    first.connection().open.store(false, SeqCst);
    let second = pool.lease(&"a", maker.connect()).await.unwrap();
    assert_eq!(second.connection().number, 2);
    let third = pool.replace(&"a", second, maker.connect()).await.unwrap();
    assert_eq!(third.connection().number, 3);
    assert_eq!(pool.connections(), 1);
}

#[tokio::test]
async fn the_peer_s_limit_counts_if_it_is_lower() {
    let (pool, maker) = (pool(10, LONG), Arc::new(Maker::default()));
    let narrow = || async {
        Ok(Fake {
            number: 100,
            open: Arc::new(AtomicBool::new(true)),
            limit: 1,
        })
    };
    let first = pool.lease(&"a", narrow).await.unwrap();
    let second = pool.lease(&"a", maker.connect()).await.unwrap();
    assert_eq!(first.connection().number, 100);
    assert_eq!(second.connection().number, 1);
}

#[tokio::test]
async fn connections_without_streams_are_released_after_a_while_and_others_are_not() {
    let (pool, maker) = (
        pool(10, Duration::from_millis(80)),
        Arc::new(Maker::default()),
    );
    let used = pool.lease(&"a", maker.connect()).await.unwrap();
    drop(pool.lease(&"b", maker.connect()).await.unwrap());
    assert_eq!(pool.connections(), 2);
    tokio::time::sleep(Duration::from_millis(400)).await;
    assert_eq!(pool.connections(), 1);
    drop(used);
    tokio::time::sleep(Duration::from_millis(400)).await;
    assert_eq!(pool.connections(), 0);
}

#[tokio::test]
async fn what_is_forgotten_is_not_reused() {
    let (pool, maker) = (pool(10, LONG), Arc::new(Maker::default()));
    let before = pool.lease(&"a", maker.connect()).await.unwrap();
    pool.forget(|key| *key == "a");
    let after = pool.lease(&"a", maker.connect()).await.unwrap();
    assert_ne!(before.connection().number, after.connection().number);
    assert_eq!(pool.connections(), 1);
}
