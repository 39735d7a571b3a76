//! From what an operator types to a connection that can be followed.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use anyhow::{Context, anyhow, bail};

use super::Explanation;
use super::gather::{self, Found};
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
            let address = found.pods[pod].addresses.first().copied();
            (place, address, found.pods[pod].name.clone())
        }
        Client::Node(node) => {
            let name = found.nodes[node].name.clone();
            (stage.nodes[node].place, None, name)
        }
        Client::Outside => {
            let place = stage.live.find("outside");
            let place = place.context("the host outside is known in a lab only")?;
            let address = IpAddr::V4(lab::topology::OUTSIDE);
            (place, Some(address), "outside".to_owned())
        }
    };
    let question = Question {
        place,
        client: client.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED)),
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
            legs: self.stage.follow(question),
            notes,
        }
    }
}

impl Found {
    fn pod_named(&self, name: &str) -> Option<usize> {
        let short = |pod: &gather::PodFound| pod.name.rsplit('/').next() == Some(name);
        self.pods
            .iter()
            .position(|pod| pod.name == name || short(pod))
    }

    fn resolve(&self, asked: &Asked) -> anyhow::Result<(Client, SocketAddr)> {
        let pod = self
            .pod_named(&asked.pod)
            .ok_or_else(|| anyhow!("no pod {} is known here", asked.pod))?;
        let Some(from) = &asked.from else {
            return Ok((Client::Pod(pod), self.address(pod, &asked.to)?));
        };
        let own = self.pods[pod]
            .addresses
            .first()
            .context("the pod has no address")?;
        let to = match (asked.to.parse::<u16>(), asked.to.parse::<SocketAddr>()) {
            (Ok(port), _) => SocketAddr::new(*own, port),
            (_, Ok(address)) => address,
            _ => bail!("{:?} is neither a port nor an address with one", asked.to),
        };
        let client = match (from.as_str(), self.pod_named(from)) {
            ("outside" | "out", _) => Client::Outside,
            (_, Some(pod)) => Client::Pod(pod),
            (name, None) => {
                let node = self.nodes.iter().position(|node| node.name == name);
                Client::Node(node.ok_or_else(|| anyhow!("neither a node nor a pod: {name}"))?)
            }
        };
        Ok((client, to))
    }

    /// Where an operator means to connect to.
    fn address(&self, from: usize, to: &str) -> anyhow::Result<SocketAddr> {
        if let Ok(address) = to.parse() {
            return Ok(address);
        }
        let (name, port) = to
            .rsplit_once(':')
            .ok_or_else(|| anyhow!("{to:?} has no port: want ADDRESS:PORT"))?;
        let port = port.parse().with_context(|| format!("port of {to:?}"))?;
        if let Some(pod) = self.pod_named(name) {
            let ip = self.pods[pod].addresses.first();
            return Ok(SocketAddr::new(
                *ip.context("the pod has no address")?,
                port,
            ));
        }
        let mesh = self.nodes[self.pods[from].node].mesh.as_ref();
        let mesh = mesh.context("no proxy says what the mesh is; give an address")?;
        if let Some(workload) = mesh.pod(name)
            && let Some(ip) = workload.addresses.first()
        {
            return Ok(SocketAddr::new(*ip, port));
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
            && let Some(ip) = self.pods[*pod].addresses.first()
        {
            let outbound = mesh.outbound(SocketAddr::new(*ip, 0), to, endpoint);
            addresses.extend(outbound.next.map(|(dialled, _)| dialled.ip()));
            addresses.extend(outbound.decision.among.iter().map(SocketAddr::ip));
        }
        addresses
    }
}
