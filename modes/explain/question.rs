//! From what an operator types to a connection that can be followed.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context, anyhow, bail};

use super::Explanation;
use super::gather::{self, Found};
use super::mesh::like;
use super::story::{Question, Stage};

/// What an operator asks.
#[derive(Debug, Clone)]
pub struct Asked {
    /// The pod.
    pub pod: String,
    /// `ADDRESS:PORT`, `POD:PORT` or `SERVICE:PORT`; with `from`, a port of the pod or an address of it with one.
    pub to: String,
    /// Who begins, if not the pod: a node, a pod, or `outside`.
    pub from: Option<String>,
    /// Of several endpoints, the one to show.
    pub endpoint: Option<SocketAddr>,
}

/// Who begins.
#[derive(Debug, Clone)]
enum Client {
    Pod(usize),
    Node(usize),
    Outside,
}

/// A question with all that was read for its answer.
#[derive(Debug)]
pub struct Prepared {
    /// What could be asked.
    pub found: Found,
    /// The state of the namespaces.
    pub stage: Stage,
    /// The question.
    pub question: Question,
}

/// Reads the state of everything on the way and predicts it.
///
/// # Errors
/// When this node's agent does not answer, a name means nothing, or a namespace cannot be read.
pub async fn ask(asked: &Asked) -> anyhow::Result<Explanation> {
    let prepared = prepare(asked).await?;
    Ok(prepared.explain(&prepared.question))
}

/// Reads the state of everything on the way.
///
/// # Errors
/// As [`ask`].
pub async fn prepare(asked: &Asked) -> anyhow::Result<Prepared> {
    let found = gather::find().await?;
    let (client, to) = found.resolve(asked)?;
    let mut involved = Vec::new();
    if let Client::Pod(pod) = client {
        involved.push(pod);
    }
    for address in found.destinations(&client, to, asked.endpoint) {
        let pod = found
            .pods
            .iter()
            .position(|pod| pod.addresses.contains(&address));
        involved.extend(pod.filter(|pod| !involved.contains(pod)));
    }
    let in_lab = found.topology.is_some();
    let stage = found.stage(&involved, in_lab).await?;
    let (place, client, who) = match client {
        Client::Pod(pod) => {
            let place = stage.pods[pod].place.context("the pod's namespace")?;
            let addresses = &found.pods[pod].addresses;
            let address = addresses.iter().find(|ip| ip.is_ipv4() == to.is_ipv4());
            let address = address.with_context(|| {
                let name = &found.pods[pod].name;
                format!(
                    "pod {name} has no address of the family of {to}: it has {}",
                    listed(addresses)
                )
            })?;
            (place, Some(*address), found.pods[pod].name.clone())
        }
        Client::Node(node) => {
            let name = found.nodes[node].name.clone();
            (stage.nodes[node].place, None, name)
        }
        Client::Outside => {
            let place = stage.live.find("outside");
            let place = place.context("the host outside is known in a lab only")?;
            let families = lab::topology::Families::Dual;
            let own = families.addresses(lab::topology::OUTSIDE);
            let address = own.into_iter().find(|ip| ip.is_ipv4() == to.is_ipv4());
            (place, address, "outside".to_owned())
        }
    };
    let question = Question {
        place,
        client: client.unwrap_or(match to {
            SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        }),
        who,
        to,
        endpoint: asked.endpoint,
        ports: Vec::new(),
    };
    Ok(Prepared {
        found,
        stage,
        question,
    })
}

impl Prepared {
    /// The prediction.
    pub fn explain(&self, question: &Question) -> Explanation {
        let mut notes = self.found.notes.clone();
        for place in &self.stage.live.places {
            for table in &place.state.not_evaluated {
                notes.push(format!(
                    "{}: nftables' table {table} is not evaluated",
                    place.name
                ));
            }
        }
        Explanation {
            from: question.who.clone(),
            to: question.to.to_string(),
            capture: self.stage.capture_of(question.place),
            legs: self.stage.follow(question),
            notes,
        }
    }
}

impl Found {
    /// A pod by `NAMESPACE/NAME`, or by its name alone where only one has it.
    fn pod_named(&self, name: &str) -> Option<usize> {
        if let Some(exactly) = self.pods.iter().position(|pod| pod.name == name) {
            return Some(exactly);
        }
        let short = |pod: &gather::PodFound| pod.name.rsplit('/').next() == Some(name);
        let mut found = (0..self.pods.len()).filter(|index| short(&self.pods[*index]));
        found.next().filter(|_| found.next().is_none())
    }

    /// Why there is no such pod, and what there is.
    fn unknown_pod(&self, name: &str) -> anyhow::Error {
        let of_name = |pod: &&gather::PodFound| pod.name.rsplit('/').next() == Some(name);
        let same: Vec<&str> = self
            .pods
            .iter()
            .filter(of_name)
            .map(|it| &*it.name)
            .collect();
        if same.len() > 1 {
            return anyhow!("{name} is the name of several pods: {}", same.join(", "));
        }
        if let Ok(ip) = name.parse::<IpAddr>() {
            let own = self.pods.iter().find(|pod| pod.addresses.contains(&ip));
            let name = own.map_or("", |pod| &pod.name);
            return anyhow!("want a pod's NAMESPACE/NAME, not its address {ip} {name}");
        }
        let mesh = self.nodes.iter().find_map(|node| node.mesh.as_ref());
        if let Some(workload) = mesh.and_then(|mesh| mesh.pod(name)) {
            let node = &workload.node;
            return anyhow!("pod {name} is on node {node}: ask there");
        }
        let known: Vec<&str> = self.pods.iter().map(|pod| &*pod.name).collect();
        match known.len() {
            0 => anyhow!("no pod {name}: the agent here knows none (`ambidex get pods`)"),
            _ => anyhow!(
                "no pod {name} is known here; there are {}",
                known.join(", ")
            ),
        }
    }

    fn resolve(&self, asked: &Asked) -> anyhow::Result<(Client, SocketAddr)> {
        let pod = self
            .pod_named(&asked.pod)
            .ok_or_else(|| self.unknown_pod(&asked.pod))?;
        let Some(from) = &asked.from else {
            return Ok((Client::Pod(pod), self.address(pod, &asked.to)?));
        };
        let own = &self.pods[pod].addresses;
        let first = own.first().context("the pod has no address")?;
        let to = match (asked.to.parse::<u16>(), asked.to.parse::<SocketAddr>()) {
            (Ok(0), _) => bail!("port 0 is no port that anybody listens on"),
            (Ok(port), _) => SocketAddr::new(*first, port),
            (_, Ok(address)) => address,
            _ => bail!(
                "{:?} is neither a port of pod {} nor one of its addresses with a port",
                asked.to,
                self.pods[pod].name
            ),
        };
        let client = match (from.as_str(), self.pod_named(from)) {
            ("outside" | "out", _) => Client::Outside,
            (_, Some(pod)) => Client::Pod(pod),
            (name, None) => {
                let node = self.nodes.iter().position(|node| node.name == name);
                let nodes: Vec<&str> = self.nodes.iter().map(|node| &*node.name).collect();
                Client::Node(node.ok_or_else(|| {
                    anyhow!(
                        "--from {name}: neither a node ({}) nor a pod that is known here",
                        nodes.join(", ")
                    )
                })?)
            }
        };
        Ok((client, to))
    }

    /// Where an operator means to connect to.
    fn address(&self, from: usize, to: &str) -> anyhow::Result<SocketAddr> {
        let (name, port) = match to.parse::<SocketAddr>() {
            Ok(address) => (address.ip().to_string(), address.port()),
            Err(_) => split(to)?,
        };
        if port == 0 {
            bail!("{to:?}: port 0 is no port that anybody listens on");
        }
        if let Ok(ip) = name.parse() {
            return Ok(SocketAddr::new(ip, port));
        }
        let name = name.as_str();
        let own = self.pods[from].addresses.first();
        let own = *own.context("the pod that begins has no address")?;
        if let Some(pod) = self.pod_named(name) {
            let ip = like(&self.pods[pod].addresses, own);
            return Ok(SocketAddr::new(ip.context("the pod has no address")?, port));
        }
        let mesh = self.nodes[self.pods[from].node].mesh.as_ref();
        let mesh = mesh.with_context(|| {
            format!("no proxy says what {name} is: give an address, or start the proxy")
        })?;
        if let Some(workload) = mesh.pod(name)
            && let Some(ip) = like(&workload.addresses, own)
        {
            return Ok(SocketAddr::new(ip, port));
        }
        mesh.named(name, port)
    }

    /// Addresses that a connection may come to.
    fn destinations(
        &self,
        client: &Client,
        to: SocketAddr,
        endpoint: Option<SocketAddr>,
    ) -> Vec<IpAddr> {
        let mut addresses = vec![to.ip()];
        if let Client::Pod(pod) = client
            && let Some(mesh) = &self.nodes[self.pods[*pod].node].mesh
            && let Some(ip) = like(&self.pods[*pod].addresses, to.ip())
        {
            let outbound = mesh.outbound(SocketAddr::new(ip, 0), to, endpoint);
            addresses.extend(outbound.next.map(|(dialled, _)| dialled.ip()));
            addresses.extend(outbound.decision.among.iter().map(SocketAddr::ip));
        }
        addresses
    }
}

/// `NAME:PORT`. An address of IPv6 stands in brackets.
fn split(to: &str) -> anyhow::Result<(String, u16)> {
    if to.parse::<Ipv6Addr>().is_ok() {
        bail!("{to:?} has no port: want [ADDRESS]:PORT");
    }
    let want = "want ADDRESS:PORT, POD:PORT or SERVICE:PORT";
    let (name, port) = to
        .rsplit_once(':')
        .ok_or_else(|| anyhow!("{to:?} has no port: {want}"))?;
    if name.contains(':') {
        bail!("{to:?}: an address of IPv6 stands in brackets: [ADDRESS]:PORT");
    }
    let port = port
        .parse()
        .map_err(|_| anyhow!("{to:?}: {port:?} is no port: {want}"))?;
    Ok((name.to_owned(), port))
}

fn listed(addresses: &[IpAddr]) -> String {
    let all: Vec<String> = addresses.iter().map(ToString::to_string).collect();
    all.join(", ")
}
