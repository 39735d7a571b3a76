//! Our agent and our proxy, over a real socket.

use tokio::sync::{mpsc, oneshot};

use super::*;
use crate::zds::client::{self, ClientOptions};
use crate::zds::server::{ProxyConnected, ProxyEvent, ProxyHook, ZdsError, ZdsHandle, ZdsServer};

struct Hook;

impl ProxyHook for Hook {
    async fn on_proxy(&self, _: &ProxyConnected) -> Result<Option<NodeConfiguration>, String> {
        Ok(Some(NodeConfiguration {
            flow: "hybrid".to_owned(),
            same_node: "direct".to_owned(),
            node_addresses: vec!["10.244.1.1".parse().unwrap()],
        }))
    }

    async fn on_snapshot(&self, _: &ProxyConnected) -> Result<(), String> {
        Ok(())
    }
}

#[tokio::test]
async fn pods_of_both_modes_live_and_die() {
    let place = place();
    let pod = Netns::create_unnamed().unwrap();
    let own = Netns::create_unnamed().unwrap();
    let handler = Arc::new(Recorder::default());
    let (stop, stopped) = oneshot::channel::<()>();
    let options = ClientOptions {
        path: place.socket.clone(),
        extension: true,
        own_netns: own.clone(),
        default_drain: Duration::from_secs(3),
    };
    // The proxy is there before the agent.
    let proxy = tokio::spawn(client::run(options, Arc::clone(&handler), async {
        let _ = stopped.await;
    }));
    sleep(Duration::from_millis(50)).await;

    let server = ZdsServer::bind(&place.socket).unwrap();
    let agent = server.handle();
    agent.register(inpod("in-snapshot", &pod)).unwrap();
    let (sender, mut events) = mpsc::unbounded_channel();
    let serving = tokio::spawn(server.run(Arc::new(Hook), sender));
    let Some(ProxyEvent::Connected(connected)) = events.recv().await else {
        panic!("connected comes first")
    };
    assert_eq!(connected.proxy_netns.unwrap().id(), own.id());
    assert!(matches!(
        events.recv().await,
        Some(ProxyEvent::SnapshotSent { .. })
    ));

    agent.add(node("on-node", "10.244.1.9")).await.unwrap();
    handler.fail("bad");
    let refused = agent.add(node("bad", "10.244.1.8")).await;
    assert!(matches!(refused, Err(ZdsError::Rejected { .. })));
    let states = agent.state().await.unwrap();
    let seen: Vec<_> = states
        .iter()
        .map(|s| (s.uid.as_str(), s.capture_mode(), s.up, s.connections))
        .collect();
    assert_eq!(
        seen,
        [
            ("bad", CaptureMode::Node, false, 0),
            ("in-snapshot", CaptureMode::Inpod, true, 7),
            ("on-node", CaptureMode::Node, true, 7),
        ]
    );
    agent.del("on-node", Duration::ZERO).await.unwrap();
    agent.del("bad", Duration::ZERO).await.unwrap();
    assert_eq!(
        handler.calls(),
        [
            "configure hybrid direct [10.244.1.1]".to_owned(),
            format!("add in-snapshot inpod {}", pod.id()),
            "ready".to_owned(),
            "add on-node node [10.244.1.9]".to_owned(),
            "add bad node [10.244.1.8]".to_owned(),
            "del on-node 0ns".to_owned(),
            "ready".to_owned(),
        ]
    );

    // The agent dies; nothing is stopped. Its successor finds the proxy again.
    serving.abort();
    let _ = serving.await;
    let server = ZdsServer::bind(&place.socket).unwrap();
    let agent = server.handle();
    agent.register(inpod("in-snapshot", &pod)).unwrap();
    let (sender, _events) = mpsc::unbounded_channel();
    let serving = tokio::spawn(server.run(Arc::new(Hook), sender));
    until("ready again", || handler.count("ready") == 3).await;
    assert_eq!(handler.count("disconnected"), 1);
    assert_eq!(
        handler.count(&format!("add in-snapshot inpod {}", pod.id())),
        1,
        "it never stopped"
    );

    stop.send(()).unwrap();
    timeout(PATIENCE, proxy).await.unwrap().unwrap();
    until("the agent saw it go", || !agent.has_proxy()).await;
    serving.abort();
}

/// An agent with one node-captured pod, and the proxy that serves it.
struct Served {
    place: Place,
    handler: Arc<Recorder>,
    agent: ZdsHandle,
    serving: tokio::task::JoinHandle<()>,
    _proxy: tokio::task::JoinHandle<()>,
}

async fn served() -> Served {
    let place = place();
    let handler = Arc::new(Recorder::default());
    let server = ZdsServer::bind(&place.socket).unwrap();
    let agent = server.handle();
    agent.register(node("pod", "10.244.1.9")).unwrap();
    let (sender, _) = mpsc::unbounded_channel();
    let serving = tokio::spawn(server.run(Arc::new(Hook), sender));
    let options = ClientOptions {
        path: place.socket.clone(),
        extension: true,
        own_netns: Netns::current().unwrap(),
        default_drain: Duration::from_secs(3),
    };
    let proxy = tokio::spawn(client::run(
        options,
        handler.clone(),
        std::future::pending(),
    ));
    until("ready", || handler.count("ready") == 1).await;
    Served {
        place,
        handler,
        agent,
        serving,
        _proxy: proxy,
    }
}

impl Served {
    async fn mode(&self) -> CaptureMode {
        let states = self.agent.state().await.unwrap();
        assert_eq!(states.len(), 1);
        states[0].capture_mode()
    }

    /// Calls that are about a change of capture.
    fn calls(&self) -> Vec<String> {
        let about = ["hold", "prepare", "release", "add", "del"];
        let calls = self.handler.calls().into_iter();
        calls
            .filter(|call| about.contains(&call.split(' ').next().unwrap()))
            .skip(1)
            .collect()
    }
}

const A_WHILE: Duration = Duration::from_secs(2);
const CHANGES: Release = Release::Changes {
    drain: Duration::from_secs(60),
};

fn micros(count: u64) -> Duration {
    Duration::from_micros(count)
}

#[tokio::test]
async fn a_held_pod_changes_its_capture_or_keeps_it() {
    let it = served().await;
    let pod = Netns::create_unnamed().unwrap();
    let to = inpod("pod", &pod);
    let release = it.agent.release(to.clone(), CHANGES).await;
    assert!(
        matches!(release, Err(ZdsError::Rejected { .. })),
        "not held"
    );
    let hold = it.agent.hold("nobody", A_WHILE).await;
    assert!(matches!(hold, Err(ZdsError::Rejected { .. })), "not there");

    let by = it.agent.hold("pod", A_WHILE).await.unwrap();
    it.handler.fail("pod");
    it.agent.prepare(to.clone(), by).await.unwrap_err();
    it.handler.recover("pod");
    let nothing = it.agent.release(to.clone(), CHANGES).await;
    assert!(
        matches!(nothing, Err(ZdsError::Rejected { .. })),
        "to what?"
    );
    assert_eq!(it.mode().await, CaptureMode::Node);

    let by = it.agent.hold("pod", A_WHILE).await.unwrap();
    let another = it.agent.prepare(to.clone(), by + 1).await;
    assert!(matches!(another, Err(ZdsError::Lost { .. })), "{another:?}");
    it.agent.prepare(to.clone(), by).await.unwrap();
    it.agent.prepare(to.clone(), by).await.unwrap();
    let stays = node("pod", "10.244.1.9");
    it.agent.release(stays, Release::Stays).await.unwrap();
    assert_eq!(it.mode().await, CaptureMode::Node);

    let by = it.agent.hold("pod", A_WHILE).await.unwrap();
    it.agent.prepare(to.clone(), by).await.unwrap();
    let told = it.agent.release(to, CHANGES).await.unwrap();
    let mut wanted = super::delays();
    assert_eq!((wanted.median, wanted.longest), (micros(501), micros(1001)));
    wanted.connections.truncate(1000);
    assert_eq!(told, wanted);
    assert_eq!(it.mode().await, CaptureMode::Inpod);
    assert_eq!(
        it.calls(),
        [
            "hold pod 2s",
            "prepare pod inpod",
            "release pod Stays",
            "hold pod 2s",
            "prepare pod inpod",
            "release pod Stays",
            "hold pod 2s",
            "prepare pod inpod",
            "release pod Changes { drain: 60s }",
        ]
    );
}

/// Its successor says which capture the pod has, and the pod is not stopped for that.
#[rstest::rstest]
#[case(true, "release pod Changes { drain: 3s }")]
#[case(false, "release pod Stays")]
#[tokio::test]
async fn an_agent_is_lost_while_it_holds_a_pod(#[case] changed: bool, #[case] release: &str) {
    let it = served().await;
    let pod = Netns::create_unnamed().unwrap();
    let by = it.agent.hold("pod", A_WHILE).await.unwrap();
    it.agent.prepare(inpod("pod", &pod), by).await.unwrap();
    it.serving.abort();
    until("the agent is gone", || {
        it.handler.count("disconnected") == 1
    })
    .await;
    let server = ZdsServer::bind(&it.place.socket).unwrap();
    server
        .handle()
        .register(match changed {
            true => inpod("pod", &pod),
            false => node("pod", "10.244.1.9"),
        })
        .unwrap();
    let (sender, _) = mpsc::unbounded_channel();
    let serving = tokio::spawn(server.run(Arc::new(Hook), sender));
    until("ready again", || it.handler.count("ready") == 2).await;
    assert_eq!(it.calls(), ["hold pod 2s", "prepare pod inpod", release]);
    serving.abort();
}

#[tokio::test]
async fn a_thousand_pods_fit_into_a_state_query() {
    let place = place();
    let handler = Arc::new(Recorder::default());
    let server = ZdsServer::bind(&place.socket).unwrap();
    let agent = server.handle();
    for number in 0..1000 {
        let uid = format!("0a1b2c3d-0000-4000-8000-{number:012}");
        let address = format!("10.9.{}.{}", number / 250, number % 250);
        agent.register(node(&uid, &address)).unwrap();
    }
    let (sender, mut events) = mpsc::unbounded_channel();
    let serving = tokio::spawn(server.run(Arc::new(Hook), sender));
    let options = ClientOptions {
        path: place.socket.clone(),
        extension: true,
        own_netns: Netns::current().unwrap(),
        default_drain: Duration::ZERO,
    };
    let proxy = tokio::spawn(client::run(options, handler, std::future::pending()));
    while !matches!(
        timeout(PATIENCE, events.recv()).await.unwrap(),
        Some(ProxyEvent::SnapshotSent { .. })
    ) {}
    assert_eq!(agent.state().await.unwrap().len(), 1000);
    proxy.abort();
    serving.abort();
}
