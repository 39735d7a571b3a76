//! The client against an agent that does exactly what the test says.

use tokio_seqpacket::UnixSeqpacketListener;

use super::*;
use crate::zds::client::{self, ClientOptions};

struct Proxy {
    handler: Arc<Recorder>,
    listener: UnixSeqpacketListener,
    task: tokio::task::JoinHandle<()>,
    _place: Place,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn proxy(extension: bool) -> Proxy {
    let place = place();
    std::fs::create_dir_all(place.socket.parent().unwrap()).unwrap();
    let listener = UnixSeqpacketListener::bind(&place.socket).unwrap();
    let handler = Arc::new(Recorder::default());
    let options = ClientOptions {
        path: place.socket.clone(),
        extension,
        own_netns: Netns::current().unwrap(),
        default_drain: Duration::from_secs(3),
    };
    let task = tokio::spawn(client::run(
        options,
        Arc::clone(&handler),
        std::future::pending(),
    ));
    Proxy {
        handler,
        listener,
        task,
        _place: place,
    }
}

impl Proxy {
    /// The next connection, its hello read.
    async fn connection(&mut self) -> (Raw, ZdsHello) {
        let socket = timeout(PATIENCE, self.listener.accept()).await.unwrap();
        let mut raw = Raw::over(socket.unwrap());
        let hello = raw.packet().await.unwrap().parse().unwrap();
        (raw, hello)
    }

    /// Sends one packet of bytes on a fresh connection: it is answered with a nack, and the connection ends.
    async fn violates(&mut self, bytes: &[u8], fds: &[impl AsFd]) -> String {
        let socket = timeout(PATIENCE, self.listener.accept()).await.unwrap();
        let socket = socket.unwrap();
        send_bytes(&socket, bytes, fds).await;
        let mut raw = Raw::over(socket);
        let _hello = raw.packet().await.unwrap();
        let error = raw.ack().await;
        assert!(!error.is_empty(), "a nack says why");
        raw.expect_end().await;
        error
    }
}

fn add(uid: &str) -> Request {
    Request::Add(AddWorkload {
        uid: uid.to_owned(),
        workload_info: Some(info()),
        ..AddWorkload::default()
    })
}

fn snapshot_sent() -> Request {
    Request::SnapshotSent(SnapshotSent {})
}

fn del(uid: &str) -> Request {
    Request::Del(DelWorkload {
        uid: uid.to_owned(),
        drain_millis: None,
    })
}

#[tokio::test]
async fn the_same_namespace_is_a_repetition_another_one_a_replacement() {
    let mut proxy = proxy(false);
    let (mut agent, hello) = proxy.connection().await;
    assert_eq!((hello.version, hello.extension_version), (1, 0));
    let first = Netns::create_unnamed().unwrap();
    let second = Netns::create_unnamed().unwrap();
    assert_eq!(agent.ask(add("a"), Some(&first)).await, "");
    assert_eq!(agent.ask(snapshot_sent(), None).await, "");
    assert_eq!(agent.ask(add("a"), Some(&first)).await, "");
    assert_eq!(agent.ask(add("a"), Some(&second)).await, "");
    assert_eq!(agent.ask(del("a"), None).await, "");
    assert_eq!(agent.ask(del("never added"), None).await, "");
    assert_eq!(
        proxy.handler.calls(),
        [
            format!("add a inpod {}", first.id()),
            "ready".to_owned(),
            "del a 3s".to_owned(),
            format!("add a inpod {}", second.id()),
            "del a 3s".to_owned(),
        ]
    );
}

#[tokio::test]
async fn what_runs_goes_on_without_an_agent_until_a_snapshot_leaves_it_out() {
    let mut proxy = proxy(false);
    let netns = Netns::create_unnamed().unwrap();
    let (mut agent, _) = proxy.connection().await;
    for uid in ["kept", "added", "gone"] {
        assert_eq!(agent.ask(add(uid), Some(&netns)).await, "");
    }
    assert_eq!(agent.ask(snapshot_sent(), None).await, "");
    drop(agent);

    let (mut agent, _) = proxy.connection().await;
    let keep = Request::Keep(KeepWorkload {
        uid: "kept".to_owned(),
    });
    assert_eq!(agent.ask(keep, None).await, "");
    assert_eq!(agent.ask(add("added"), Some(&netns)).await, "");
    let before = proxy.handler.calls();
    assert!(
        !before.iter().any(|call| call.starts_with("del")),
        "{before:?}"
    );
    assert_eq!(
        proxy.handler.count("ready"),
        1,
        "not ready before the snapshot"
    );
    assert_eq!(agent.ask(snapshot_sent(), None).await, "");
    assert_eq!(
        proxy.handler.calls()[before.len()..],
        ["del gone 3s".to_owned(), "ready".to_owned()]
    );
}

#[tokio::test]
async fn a_pod_that_cannot_be_served_is_refused_and_tried_again() {
    let mut proxy = proxy(false);
    let netns = Netns::create_unnamed().unwrap();
    let (mut agent, _) = proxy.connection().await;
    proxy.handler.fail("a");
    let refused = agent.ask(add("a"), Some(&netns)).await;
    assert_eq!(refused, "failure to start proxy: no listeners");
    assert_eq!(agent.ask(snapshot_sent(), None).await, "");
    assert_eq!(proxy.handler.count("ready"), 0, "a pod is pending");
    proxy.handler.recover("a");
    let handler = Arc::clone(&proxy.handler);
    until("retried", || handler.count("ready") == 1).await;
    assert_eq!(
        proxy.handler.count(&format!("add a inpod {}", netns.id())),
        2
    );
}

#[tokio::test]
async fn violations_are_refused_and_cost_nothing_but_the_connection() {
    let mut proxy = proxy(true);
    let netns = Netns::create_unnamed().unwrap();
    let (mut agent, _) = proxy.connection().await;
    assert_eq!(agent.ask(add("a"), Some(&netns)).await, "");
    assert_eq!(agent.ask(snapshot_sent(), None).await, "");
    drop(agent);

    let none: &[OwnedFd] = &[];
    let encoded = |request| WorkloadRequest::from(request).encode_to_vec();
    proxy.violates(&[0xff; 9], none).await;
    // Field 4 is unused.
    proxy.violates(&[0x22, 0x00], none).await;
    let oversized = proxy.violates(&[0x08; 1500], none).await;
    assert!(oversized.contains("1024"), "{oversized}");
    proxy.violates(&encoded(add("b")), none).await;
    let two = [netns.as_fd(), netns.as_fd()];
    proxy.violates(&encoded(add("b")), &two).await;
    let one = [netns.as_fd()];
    proxy.violates(&encoded(snapshot_sent()), &one).await;
    // Of the extension, but never agreed on by a first request.
    let get_state = Request::GetState(GetState {});
    let node_pod = Request::Add(AddWorkload {
        uid: "n".to_owned(),
        workload_info: Some(info()),
        capture_mode: CaptureMode::Node.into(),
        addresses: vec![vec![10, 0, 0, 1]],
        guests: false,
    });
    proxy.violates(&encoded(get_state), none).await;
    proxy.violates(&encoded(node_pod), none).await;

    let (mut agent, _) = proxy.connection().await;
    assert_eq!(agent.ask(add("a"), Some(&netns)).await, "");
    assert_eq!(agent.ask(snapshot_sent(), None).await, "");
    assert_ne!(agent.ask(snapshot_sent(), None).await, "", "a second one");
    agent.expect_end().await;
    let calls = proxy.handler.calls();
    let changes: Vec<_> = calls
        .iter()
        .filter(|call| call.starts_with("add") || call.starts_with("del"))
        .collect();
    assert_eq!(changes, [&format!("add a inpod {}", netns.id())]);
}

#[tokio::test]
async fn what_is_wrong_with_one_pod_does_not_end_the_connection() {
    let mut proxy = proxy(false);
    let netns = Netns::create_unnamed().unwrap();
    let (mut agent, _) = proxy.connection().await;
    let nameless = Request::Add(AddWorkload {
        uid: "a".to_owned(),
        ..AddWorkload::default()
    });
    let refused = agent.ask(nameless, Some(&netns)).await;
    assert!(refused.contains("workload_info"), "{refused}");
    let file = std::fs::File::open("/proc/self/ns/mnt").unwrap();
    let request = WorkloadRequest::from(add("b"));
    agent
        .transport
        .send(&request, Some(file.as_fd()))
        .await
        .unwrap();
    let refused = agent.ack().await;
    assert!(refused.contains("not a network namespace"), "{refused}");
    assert_eq!(agent.ask(add("c"), Some(&netns)).await, "");
}
