//! Two nodes, three pods and their certificates, on loopback addresses of their own.
// Tests play the clients and the applications, and this file the capture: here sockets are made by hand.
#![allow(clippy::disallowed_methods)]

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener as StdListener};
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use shared_proxy::capture::{
    ClientAddr, HBONE_PORT, Listener, LocalWorkload, OnBehalfOf, OrigDstAddr, Refusal, Role, Scope,
    ScopeId,
};
use shared_proxy::core::{Attached, Core, CoreConfig};
use shared_proxy::identity::{Certificates, LocalCa, RefreshPolicy, TlsOptions};
use shared_proxy::ports::SourcePorts;
use shared_proxy::state::{Store, local_xds};
use shared_proxy::telemetry::{Telemetry, TelemetryOptions};
use tempfile::TempDir;
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::time::timeout;

/// The service that the tests' clients name. Nobody listens there: the capture takes the connection first.
pub const VIP: &str = "10.96.0.1:80";
/// Last numbers of the pods' addresses: two clients of one service account, one server.
pub const CLIENT: u8 = 11;
pub const TWIN: u8 = 12;
pub const SERVER: u8 = 21;
/// Port of the server's application.
pub const PORT: u16 = 8080;

const WORKLOADS: &str = r#"
workloads:
- {uid: client, name: client, namespace: default, serviceAccount: client, trustDomain: cluster.local,
   workloadIps: [NET.11], protocol: HBONE, node: one, network: "", services: {}}
- {uid: twin, name: twin, namespace: default, serviceAccount: client, trustDomain: cluster.local,
   workloadIps: [NET.12], protocol: HBONE, node: one, network: "", services: {}}
- {uid: server, name: server, namespace: default, serviceAccount: server, trustDomain: cluster.local,
   workloadIps: [NET.21], protocol: PROTOCOL, node: two, network: "",
   services: {default/server.default.svc.cluster.local: {80: 8080}}}
services:
- {name: server, namespace: default, hostname: server.default.svc.cluster.local, vips: [/10.96.0.1], ports: {80: 8080}}
"#;

/// 127.x.y.0/24 that no other test uses, of this process or another.
struct Block {
    prefix: [u8; 3],
    _reserved: StdListener,
}

impl Block {
    fn reserve() -> Self {
        for _ in 0..1000 {
            let prefix = [127, rand::random_range(1..255), rand::random_range(0..255)];
            let address = Ipv4Addr::new(prefix[0], prefix[1], prefix[2], 254);
            if let Ok(listener) = StdListener::bind((address, 15_099)) {
                return Self {
                    prefix,
                    _reserved: listener,
                };
            }
        }
        panic!("no free block of loopback addresses");
    }
}

/// What both nodes share: control plane and CA.
pub struct Mesh {
    block: Block,
    pub store: Arc<Store>,
    ca: Arc<LocalCa>,
    dir: TempDir,
}

/// One proxy.
pub struct Node {
    pub core: Core,
    pub telemetry: Arc<Telemetry>,
}

impl Mesh {
    /// With the tests' workloads and service.
    pub fn new() -> Self {
        let mesh = Self::empty();
        mesh.publish("HBONE", "");
        mesh
    }

    /// Without any workload yet.
    pub fn empty() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let ca = LocalCa::open(dir.path(), "cluster.local", Duration::from_secs(3600)).unwrap();
        Self {
            block: Block::reserve(),
            store: Arc::new(Store::new()),
            ca: Arc::new(ca),
            dir,
        }
    }

    /// Tells of the workloads, the server's protocol, and of policies (YAML).
    pub fn publish(&self, protocol: &str, policies: &str) {
        let text = WORKLOADS.replace("PROTOCOL", protocol);
        self.publish_text(&format!("{text}{policies}"));
    }

    /// Tells of a state (YAML). `NET` in it stands for the first three numbers of this mesh's addresses.
    pub fn publish_text(&self, text: &str) {
        let snapshot = local_xds::parse(&self.fill(text));
        self.store
            .replace(snapshot.unwrap_or_else(|error| panic!("{error}\n{text}")));
    }

    /// The text with this mesh's addresses.
    pub fn fill(&self, text: &str) -> String {
        let [a, b, c] = self.block.prefix;
        text.replace("NET", &format!("{a}.{b}.{c}"))
    }

    pub fn ca(&self) -> Arc<LocalCa> {
        self.ca.clone()
    }

    /// The CA with the same root, for another trust domain.
    pub fn ca_of(&self, trust_domain: &str) -> Arc<LocalCa> {
        let ttl = Duration::from_secs(3600);
        Arc::new(LocalCa::open(self.dir.path(), trust_domain, ttl).unwrap())
    }

    /// A file of the CA, in PEM.
    pub fn ca_file(&self, name: &str) -> String {
        std::fs::read_to_string(self.dir.path().join(name)).unwrap()
    }

    pub fn ip(&self, last: u8) -> IpAddr {
        let [a, b, c] = self.block.prefix;
        Ipv4Addr::new(a, b, c, last).into()
    }

    pub fn app(&self) -> SocketAddr {
        SocketAddr::new(self.ip(SERVER), PORT)
    }

    pub fn node(&self) -> Node {
        self.node_with(quick())
    }

    pub fn node_with(&self, config: CoreConfig) -> Node {
        self.node_under(config, TlsOptions::default()).0
    }

    /// With what is asked of peers besides, and the certificates of its pods.
    pub fn node_under(&self, config: CoreConfig, tls: TlsOptions) -> (Node, Arc<Certificates>) {
        let telemetry = Arc::new(Telemetry::new(TelemetryOptions {
            component: "test".to_owned(),
            tag: "0".to_owned(),
            ..TelemetryOptions::default()
        }));
        let policy = RefreshPolicy::default();
        let certificates = Arc::new(Certificates::with_options(self.ca.clone(), policy, tls));
        let core = Core::new(
            config,
            self.store.clone(),
            certificates.clone(),
            telemetry.clone(),
        );
        (Node { core, telemetry }, certificates)
    }

    pub fn pod(&self, last: u8, account: &str) -> LocalWorkload {
        LocalWorkload {
            uid: format!("uid-{last}").into(),
            name: format!("pod-{last}").into(),
            namespace: "default".into(),
            service_account: account.into(),
            addresses: [self.ip(last)].into(),
        }
    }

    /// A capture of the two clients.
    pub fn clients(&self) -> LoopbackScope {
        LoopbackScope::new(
            "clients",
            vec![self.pod(CLIENT, "client"), self.pod(TWIN, "client")],
        )
    }

    /// A capture of the server, with its HBONE listener.
    pub fn server(&self) -> LoopbackScope {
        self.server_as("server")
    }

    pub fn server_as(&self, account: &str) -> LoopbackScope {
        let scope = LoopbackScope::new("server", vec![self.pod(SERVER, account)]);
        let hbone = SocketAddr::new(self.ip(SERVER), HBONE_PORT);
        scope.add(Role::InboundHbone, StdListener::bind(hbone).unwrap(), None);
        scope
    }

    /// An application on the server's port.
    pub async fn listen(&self) -> TcpListener {
        TcpListener::bind(self.app()).await.unwrap()
    }

    /// A connection of a pod.
    pub async fn connect(&self, from: u8, to: SocketAddr) -> io::Result<TcpStream> {
        let socket = TcpSocket::new_v4()?;
        socket.bind(SocketAddr::new(self.ip(from), 0))?;
        socket.connect(to).await
    }
}

/// Both nodes with everything attached, and the address at which the clients' capture takes connections to [`VIP`].
pub struct Pair {
    pub mesh: Mesh,
    pub one: Node,
    pub two: Node,
    pub door: SocketAddr,
    pub clients: Attached,
    pub server: Attached,
}

impl Pair {
    pub async fn new() -> Self {
        Self::of(Mesh::new(), quick()).await
    }

    pub async fn of(mesh: Mesh, config: CoreConfig) -> Self {
        let (one, two) = (mesh.node_with(config.clone()), mesh.node_with(config));
        let scope = mesh.clients();
        let door = scope.forward(mesh.ip(CLIENT), Role::Outbound, VIP.parse().unwrap());
        let clients = one.core.attach(Arc::new(scope)).await.unwrap();
        let server = two.core.attach(Arc::new(mesh.server())).await.unwrap();
        Self {
            mesh,
            one,
            two,
            door,
            clients,
            server,
        }
    }

    pub async fn connect(&self) -> TcpStream {
        self.mesh.connect(CLIENT, self.door).await.unwrap()
    }
}

/// The connection is reset without a byte. That may be so soon that connecting already fails.
pub async fn assert_refused(client: io::Result<TcpStream>) {
    let refused = match client {
        Ok(mut client) => timeout(Duration::from_secs(30), client.read(&mut [0; 16]))
            .await
            .unwrap()
            .map(|_| ()),
        Err(error) => Err(error),
    };
    assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
}

/// The metrics hold a failed connection with this flag. The account is closed a moment after the connection.
pub async fn assert_failed(node: &Node, flag: &str) {
    let label = format!("response_flags=\"{flag}\"");
    let found = timeout(Duration::from_secs(5), async {
        loop {
            let text = node.telemetry.encode().unwrap();
            let hit = |line: &&str| line.contains("failed_total{") && line.contains(&label);
            if text.lines().any(|line| hit(&line)) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    if found.await.is_err() {
        panic!(
            "no failure with {label}:\n{}",
            node.telemetry.encode().unwrap()
        );
    }
}

/// The defaults, with waits that suit a test.
pub fn quick() -> CoreConfig {
    CoreConfig {
        connect_timeout: Duration::from_secs(5),
        workload_wait: Duration::from_millis(500),
        ..CoreConfig::default()
    }
}

/// A capture without redirection: each listener stands for one destination.
#[derive(Debug)]
pub struct LoopbackScope {
    id: ScopeId,
    pods: Vec<LocalWorkload>,
    listeners: Mutex<Vec<(Role, StdListener, Option<SocketAddr>)>>,
    hands_over: Vec<LocalWorkload>,
    ports: Option<SourcePorts>,
    reaches_loopback: bool,
}

impl LoopbackScope {
    pub fn new(instance: &str, pods: Vec<LocalWorkload>) -> Self {
        Self {
            id: ScopeId {
                capture_mode: "loopback",
                instance: instance.into(),
            },
            pods,
            listeners: Mutex::default(),
            hands_over: Vec::new(),
            ports: None,
            reaches_loopback: false,
        }
    }

    fn add(&self, role: Role, listener: StdListener, dst: Option<SocketAddr>) {
        listener.set_nonblocking(true).unwrap();
        self.listeners.lock().unwrap().push((role, listener, dst));
    }

    /// Takes connections that are meant for `dst`; returns where.
    pub fn forward(&self, at: IpAddr, role: Role, dst: SocketAddr) -> SocketAddr {
        let listener = StdListener::bind((at, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        self.add(role, listener, Some(dst));
        address
    }

    /// Takes connections of a role that say themselves where they are meant to go; returns where.
    pub fn open(&self, at: IpAddr, role: Role) -> SocketAddr {
        let listener = StdListener::bind((at, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        self.add(role, listener, None);
        address
    }

    /// Connections to `pod` are served in this process.
    pub fn handing_over(mut self, pod: LocalWorkload) -> Self {
        self.hands_over.push(pod);
        self
    }
}

impl LoopbackScope {
    /// Another way of capturing.
    pub fn in_mode(mut self, capture_mode: &'static str) -> Self {
        self.id.capture_mode = capture_mode;
        self
    }

    /// Its sockets are where the pods' loopback address is.
    pub fn reaching_loopback(mut self) -> Self {
        self.reaches_loopback = true;
        self
    }

    /// Upstream sockets take their source ports from `range`.
    pub fn with_ports(mut self, range: RangeInclusive<u16>) -> Self {
        self.ports = Some(SourcePorts::new(range));
        self
    }
}

impl Scope for LoopbackScope {
    fn id(&self) -> &ScopeId {
        &self.id
    }

    fn owner(
        &self,
        role: Role,
        client: ClientAddr,
        dst: OrigDstAddr,
    ) -> Result<LocalWorkload, Refusal> {
        let address = match role {
            Role::Outbound | Role::Socks5 => client.0.ip(),
            _ => dst.0.ip(),
        };
        self.pods
            .iter()
            .find(|pod| pod.addresses.contains(&address))
            .cloned()
            .ok_or(Refusal::UnknownOwner(address))
    }

    fn listen(&self, role: Role) -> io::Result<Vec<Listener>> {
        let mut listeners = self.listeners.lock().unwrap();
        listeners
            .extract_if(.., |(of, ..)| *of == role)
            .map(|(_, listener, dst)| match dst {
                Some(dst) => Listener::for_destination(role, listener, OrigDstAddr(dst)),
                None => Listener::new(role, listener),
            })
            .collect()
    }

    fn socket(&self, to: SocketAddr, who: OnBehalfOf) -> io::Result<TcpSocket> {
        let (OnBehalfOf::LocalWorkload(address) | OnBehalfOf::RemoteClient(address)) = who;
        if let Some(ports) = &self.ports {
            let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
            socket.set_nonblocking(true)?;
            ports.bind(&socket, address, to)?;
            return Ok(TcpSocket::from_std_stream(socket.into()));
        }
        let socket = TcpSocket::new_v4()?;
        socket.bind(SocketAddr::new(address, 0))?;
        Ok(socket)
    }

    fn reaches_loopback(&self) -> bool {
        self.reaches_loopback
    }

    fn hand_over(&self, dst: IpAddr) -> Option<LocalWorkload> {
        self.hands_over
            .iter()
            .find(|pod| pod.addresses.contains(&dst))
            .cloned()
    }
}
