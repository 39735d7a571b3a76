//! The server against a proxy that does exactly what the test says.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;

use tokio::sync::mpsc;

use super::*;
use crate::zds::server::{ProxyConnected, ProxyEvent, ProxyHook, ZdsError, ZdsHandle, ZdsServer};

/// A hook that writes down whom it was asked about, and how many pods the proxy had heard of by then.
#[derive(Default)]
struct Hook {
    asked: Mutex<Vec<ProxyConnected>>,
    configuration: Option<NodeConfiguration>,
    /// Connections whose snapshot was acknowledged.
    led_to: Mutex<Vec<u64>>,
    /// What it says then.
    refusal: Option<String>,
}

impl ProxyHook for Hook {
    async fn on_proxy(&self, proxy: &ProxyConnected) -> Result<Option<NodeConfiguration>, String> {
        self.asked.lock().unwrap().push(proxy.clone());
        Ok(self.configuration.clone())
    }

    async fn on_snapshot(&self, proxy: &ProxyConnected) -> Result<(), String> {
        self.led_to.lock().unwrap().push(proxy.id);
        match &self.refusal {
            Some(reason) => Err(reason.clone()),
            None => Ok(()),
        }
    }
}

struct Agent {
    handle: ZdsHandle,
    hook: Arc<Hook>,
    events: mpsc::UnboundedReceiver<ProxyEvent>,
    task: tokio::task::JoinHandle<()>,
    place: Place,
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn agent_with(hook: Hook) -> Agent {
    let place = place();
    let server = ZdsServer::bind(&place.socket).unwrap();
    let (sender, events) = mpsc::unbounded_channel();
    let hook = Arc::new(hook);
    Agent {
        handle: server.handle(),
        task: tokio::spawn(server.run(Arc::clone(&hook), sender)),
        hook,
        events,
        place,
    }
}

fn agent() -> Agent {
    agent_with(Hook::default())
}

impl Agent {
    async fn event(&mut self) -> ProxyEvent {
        timeout(PATIENCE, self.events.recv())
            .await
            .unwrap()
            .unwrap()
    }

    /// A proxy without the extension that has said hello.
    async fn plain_proxy(&self) -> Raw {
        let proxy = Raw::connect(&self.place.socket).await;
        proxy
            .send(&ZdsHello {
                version: Version::V1.into(),
                extension_version: 0,
            })
            .await;
        proxy
    }

    /// A proxy with the extension, past a snapshot of so many pods.
    async fn served_proxy(&mut self, pods: usize) -> Raw {
        let own = Netns::create_unnamed().unwrap();
        let mut proxy = Raw::connect(&self.place.socket).await;
        let hello = ZdsHello {
            version: Version::V1.into(),
            extension_version: 1,
        };
        proxy.send(&hello).await;
        proxy.packet().await.unwrap();
        let reply = WorkloadResponse::from(Response::Netns(NetnsReply {}));
        let fd = Some(own.as_fd());
        proxy.transport.send(&reply, fd).await.unwrap();
        for _ in 0..=pods {
            proxy.request("").await;
        }
        while !matches!(self.event().await, ProxyEvent::SnapshotSent { .. }) {}
        proxy
    }

    /// The same, past an empty snapshot.
    async fn served_plain_proxy(&mut self) -> Raw {
        let mut proxy = self.plain_proxy().await;
        let (request, _) = proxy.request("").await;
        assert_eq!(request, Request::SnapshotSent(SnapshotSent {}));
        while !matches!(self.event().await, ProxyEvent::SnapshotSent { .. }) {}
        proxy
    }
}

#[tokio::test]
async fn a_plain_proxy_gets_the_fields_bytes_and_no_node_pods() {
    let mut agent = agent();
    let netns = Netns::create_unnamed().unwrap();
    agent.handle.register(inpod("pod-a", &netns)).unwrap();
    agent.handle.expect("pod-b");
    agent.handle.register(node("pod-c", "10.0.0.9")).unwrap();

    let mut proxy = agent.plain_proxy().await;
    let packet = proxy.packet().await.unwrap();
    let bare = AddWorkload {
        uid: "pod-a".to_owned(),
        workload_info: Some(info()),
        ..AddWorkload::default()
    };
    assert_eq!(
        packet.bytes,
        WorkloadRequest::from(Request::Add(bare)).encode_to_vec(),
        "nothing but the field's own fields"
    );
    let [fd] = <[OwnedFd; 1]>::try_from(packet.fds).expect("exactly one descriptor");
    assert_eq!(Netns::from_fd(fd).unwrap().id(), netns.id());
    proxy.send(&WorkloadResponse::ack("")).await;

    let keep = KeepWorkload {
        uid: "pod-b".to_owned(),
    };
    let (request, fds) = proxy.request("").await;
    assert_eq!((request, fds.len()), (Request::Keep(keep), 0));
    let (request, _) = proxy.request("").await;
    assert_eq!(request, Request::SnapshotSent(SnapshotSent {}));

    let ProxyEvent::Connected(connected) = agent.event().await else {
        panic!("connected comes first")
    };
    assert!(!connected.extension && connected.proxy_netns.is_none());
    assert!(matches!(agent.event().await, ProxyEvent::SnapshotSent { id } if id == connected.id));

    let refused = agent.handle.add(node("pod-d", "10.0.0.8")).await;
    assert!(matches!(refused, Err(ZdsError::NoExtension { .. })));

    drop(proxy);
    assert!(matches!(agent.event().await, ProxyEvent::Disconnected { id } if id == connected.id));
    let nobody = agent.handle.add(inpod("pod-a", &netns)).await;
    assert!(matches!(nobody, Err(ZdsError::NoProxy { .. })));
}

#[tokio::test]
async fn the_extension_is_prepared_before_any_pod_is_announced() {
    let mut agent = agent_with(Hook {
        configuration: Some(NodeConfiguration {
            flow: "tunnel".to_owned(),
            same_node: "hbone".to_owned(),
            node_addresses: vec!["172.18.0.2".parse().unwrap()],
        }),
        ..Hook::default()
    });
    agent.handle.register(node("pod-n", "10.0.0.9")).unwrap();
    let own = Netns::create_unnamed().unwrap();
    let mut proxy = Raw::connect(&agent.place.socket).await;
    proxy
        .send(&ZdsHello {
            version: Version::V1.into(),
            extension_version: 1,
        })
        .await;

    let first: WorkloadRequest = proxy.packet().await.unwrap().parse().unwrap();
    assert_eq!(first.payload, Some(Request::GetNetns(GetNetns {})));
    assert!(agent.hook.asked.lock().unwrap().is_empty());
    let reply = WorkloadResponse::from(Response::Netns(NetnsReply {}));
    proxy
        .transport
        .send(&reply, Some(own.as_fd()))
        .await
        .unwrap();

    let (request, _) = proxy.request("").await;
    let asked = agent.hook.asked.lock().unwrap().clone();
    assert_eq!(asked[0].proxy_netns.as_ref().unwrap().id(), own.id());
    assert_eq!(
        request,
        Request::ConfigureNode(ConfigureNode {
            flow: "tunnel".to_owned(),
            same_node: "hbone".to_owned(),
            node_addresses: vec![vec![172, 18, 0, 2]],
        })
    );
    let (request, fds) = proxy.request("").await;
    let Request::Add(add) = request else {
        panic!("the pod, not {request:?}")
    };
    assert_eq!(add.capture_mode, i32::from(CaptureMode::Node));
    assert_eq!(add.addresses, vec![vec![10, 0, 0, 9]]);
    assert!(fds.is_empty(), "a node-captured pod has no descriptor");
    assert!(agent.hook.led_to.lock().unwrap().is_empty());
    let (request, _) = proxy.request("").await;
    assert_eq!(request, Request::SnapshotSent(SnapshotSent {}));
    while !matches!(agent.event().await, ProxyEvent::SnapshotSent { .. }) {}
    assert_eq!(*agent.hook.led_to.lock().unwrap(), [1]);
}

#[tokio::test]
async fn node_pods_are_taken_from_all_proxies_but_one_and_given_back() {
    let mut agent = agent();
    let netns = Netns::create_unnamed().unwrap();
    agent.handle.register(inpod("pod-i", &netns)).unwrap();
    agent.handle.register(node("pod-n", "10.0.0.9")).unwrap();
    let mut first = agent.served_proxy(2).await;
    let mut second = agent.served_proxy(2).await;

    let (_, (request, _)) = tokio::join!(
        agent.handle.take_node_pods_from_others(2),
        first.request("")
    );
    let Request::Del(del) = request else {
        panic!("{request:?}")
    };
    assert_eq!((del.uid.as_str(), del.drain_millis), ("pod-n", Some(0)));
    let (_, (request, _)) = tokio::join!(agent.handle.announce_node_pods(1), first.request(""));
    let Request::Add(add) = request else {
        panic!("{request:?}")
    };
    assert_eq!(add.uid, "pod-n");
    // Nothing was said to the other one before this.
    let add = agent.handle.add(node("pod-m", "10.0.0.8"));
    let (added, (request, _)) = tokio::join!(add, second.request(""));
    added.unwrap();
    assert!(matches!(request, Request::Add(add) if add.uid == "pod-m"));
}

#[tokio::test]
async fn a_proxy_that_nothing_can_be_led_to_is_hung_up_on() {
    let mut agent = agent_with(Hook {
        refusal: Some("no tunnel device".to_owned()),
        ..Hook::default()
    });
    let mut proxy = agent.plain_proxy().await;
    let (request, _) = proxy.request("").await;
    assert_eq!(request, Request::SnapshotSent(SnapshotSent {}));
    assert!(matches!(agent.event().await, ProxyEvent::Connected(_)));
    assert!(matches!(
        agent.event().await,
        ProxyEvent::Disconnected { id: 1 }
    ));
}

#[tokio::test]
async fn a_refused_pod_is_in_the_next_snapshot() {
    let mut agent = agent();
    let netns = Netns::create_unnamed().unwrap();
    let mut proxy = agent.served_plain_proxy().await;
    let (added, _) = tokio::join!(
        agent.handle.add(inpod("pod-a", &netns)),
        proxy.request("no certificate")
    );
    let error = added.unwrap_err().to_string();
    assert_eq!(error, "pod pod-a: the proxy refused: no certificate");

    drop(proxy);
    let mut again = agent.plain_proxy().await;
    let (request, fds) = again.request("").await;
    assert!(matches!(request, Request::Add(add) if add.uid == "pod-a"));
    assert_eq!(fds.len(), 1);
    let (request, _) = again.request("").await;
    assert_eq!(request, Request::SnapshotSent(SnapshotSent {}));

    // Deleted, it is in none.
    let (deleted, (request, _)) = tokio::join!(
        agent.handle.del("pod-a", Duration::from_secs(5)),
        again.request("")
    );
    deleted.unwrap();
    let del = DelWorkload {
        uid: "pod-a".to_owned(),
        drain_millis: None,
    };
    assert_eq!(
        request,
        Request::Del(del),
        "no drain time without extension"
    );
    drop(again);
    let mut last = agent.plain_proxy().await;
    let (request, _) = last.request("").await;
    assert_eq!(request, Request::SnapshotSent(SnapshotSent {}));
}

#[tokio::test]
async fn adds_go_to_the_latest_proxy_and_dels_to_all() {
    let mut agent = agent();
    let netns = Netns::create_unnamed().unwrap();
    let mut older = agent.served_plain_proxy().await;
    let mut newer = agent.served_plain_proxy().await;
    let (added, _) = tokio::join!(agent.handle.add(inpod("pod-a", &netns)), newer.request(""));
    added.unwrap();
    let (deleted, (to_older, _), (to_newer, _)) = tokio::join!(
        agent.handle.del("pod-a", Duration::ZERO),
        older.request(""),
        newer.request("")
    );
    deleted.unwrap();
    assert!(
        matches!(to_older, Request::Del(_)),
        "not an add: {to_older:?}"
    );
    assert!(matches!(to_newer, Request::Del(_)));
}

#[tokio::test]
async fn silence_closes_the_connection() {
    let mut agent = agent();
    let netns = Netns::create_unnamed().unwrap();
    let mut proxy = agent.served_plain_proxy().await;
    let added = timeout(PATIENCE, agent.handle.add(inpod("pod-a", &netns))).await;
    assert!(matches!(added, Ok(Err(ZdsError::Lost { .. }))), "{added:?}");
    assert!(matches!(
        agent.event().await,
        ProxyEvent::Disconnected { .. }
    ));
    proxy.packet().await.expect("the add that was not answered");
    proxy.expect_end().await;
}

#[tokio::test]
async fn a_word_nobody_asked_for_closes_the_connection() {
    let mut agent = agent();
    let mut proxy = agent.served_plain_proxy().await;
    proxy.send(&WorkloadResponse::ack("")).await;
    proxy.expect_end().await;
    assert!(matches!(
        agent.event().await,
        ProxyEvent::Disconnected { .. }
    ));
}

#[tokio::test]
async fn garbage_and_oversized_packets_close_the_connection() {
    let mut agent = agent();
    for hello in [vec![0xff; 10], vec![0x08; 2000]] {
        let socket = UnixSeqpacket::connect(&agent.place.socket).await.unwrap();
        send_bytes(&socket, &hello, &[] as &[OwnedFd]).await;
        Raw::over(socket).expect_end().await;
    }
    // It still serves.
    agent.served_plain_proxy().await;
}

#[tokio::test]
async fn a_successors_socket_survives_the_predecessor() {
    let place = place();
    let first = ZdsServer::bind(&place.socket).unwrap();
    let second = ZdsServer::bind(&place.socket).unwrap();
    drop(first);
    assert!(place.socket.exists());
    drop(second);
    assert!(!place.socket.exists());
    std::fs::write(&place.socket, "not a socket").unwrap();
    assert!(matches!(
        ZdsServer::bind(&place.socket),
        Err(ZdsError::NotASocket(_))
    ));
}

/// Set in the environment of the child that plays the peer that is not root.
const PEER_SOCKET: &str = "ZDS_TEST_PEER_SOCKET";

#[test]
fn peer_that_is_not_root() {
    let Some(path) = std::env::var_os(PEER_SOCKET) else {
        return;
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        // The end may come before the hello is taken.
        let mut proxy = Raw::connect(Path::new(&path)).await;
        let hello = ZdsHello {
            version: Version::V1.into(),
            extension_version: 0,
        };
        let _ = proxy.transport.send(&hello, None).await;
        proxy.expect_end().await;
    });
}

#[tokio::test]
async fn only_root_is_served() {
    let agent = agent();
    // Let the child through the file's permissions, so that the check of credentials is what stops it.
    for directory in agent.place.socket.ancestors().take(3) {
        std::fs::set_permissions(directory, std::fs::Permissions::from_mode(0o777)).unwrap();
    }
    let copy = agent.place.socket.with_file_name("peer");
    std::fs::copy(std::env::current_exe().unwrap(), &copy).unwrap();
    std::fs::set_permissions(&copy, std::fs::Permissions::from_mode(0o755)).unwrap();
    let socket = agent.place.socket.clone();
    let status = tokio::task::spawn_blocking(move || {
        std::process::Command::new(copy)
            .args(["--exact", "zds::tests::agent_side::peer_that_is_not_root"])
            .env(PEER_SOCKET, socket)
            .current_dir("/")
            .uid(65534)
            .gid(65534)
            .output()
    })
    .await
    .unwrap()
    .unwrap();
    assert!(status.status.success(), "{status:?}");
    let output = String::from_utf8_lossy(&status.stdout);
    assert!(output.contains("1 passed"), "{output}");
    assert!(agent.hook.asked.lock().unwrap().is_empty());
}
