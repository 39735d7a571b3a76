//! Reading what a connection passes: agents, proxies, plans, and the state of namespaces.

use std::collections::BTreeMap;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, anyhow};
use futures_util::future::join_all;
use host_net::netlink::Netlink;
use host_net::netns::Netns;
use host_net::plan::{Plan, Step};
use host_net::sockets::Listeners;
use lab::standing::{LAB_ENV, Lab};
use lab::topology::Topology;
use serde_json::Value;

use super::mesh::Mesh;
use super::nft;
use super::planned;
use super::state::State;
use super::story::{Node, Pod, Stage};
use super::world::{Place, World};
use crate::agent::api::{PlacedPlan, ShownPod};
use crate::agent_client;
use crate::options::Capture;
use crate::proxy_client;
use crate::run_dir::RunDir;

/// Label of the node's namespace in plans.
const ON_NODE: &str = "node";
/// What a dump leaves out: whether a namespace forwards IPv6.
const FORWARDING6: &str = "net/ipv6/conf/all/forwarding";
/// Label of the proxy's.
const IN_PROXY: &str = "proxy";

/// A node that answers.
#[derive(Debug)]
pub struct NodeFound {
    /// Its name: in a lab `node1`, else `node`.
    pub name: String,
    /// Name of its proxy's namespace.
    pub proxy_name: String,
    /// Where its daemons meet.
    pub run_dir: RunDir,
    /// Its namespace.
    pub netns: Netns,
    /// Its proxy's.
    pub proxy: Option<Netns>,
    /// Its pods.
    pub pods: Vec<ShownPod>,
    /// The plans of its own objects.
    pub plans: Vec<PlacedPlan>,
    /// What its proxy knows.
    pub mesh: Option<Mesh>,
}

/// A pod that was found, and whether an agent has it.
#[derive(Debug, Clone)]
pub struct PodFound {
    /// `namespace/name`.
    pub name: String,
    /// Index of its node.
    pub node: usize,
    /// Its addresses.
    pub addresses: Vec<std::net::IpAddr>,
    /// Path of its namespace.
    pub netns: PathBuf,
    /// How it is captured.
    pub capture: Option<Capture>,
}

/// Everything that could be asked.
#[derive(Debug)]
pub struct Found {
    /// Nodes, this one first.
    pub nodes: Vec<NodeFound>,
    /// Pods of these nodes.
    pub pods: Vec<PodFound>,
    /// The lab, where this is one.
    pub topology: Option<Arc<Topology>>,
    /// What could not be read.
    pub notes: Vec<String>,
}

/// Asks the agent of this node, and in a lab those of the others.
///
/// # Errors
/// When this node's agent does not answer.
pub async fn find() -> anyhow::Result<Found> {
    let own = RunDir::from_env();
    let lab = std::env::var(LAB_ENV)
        .ok()
        .and_then(|name| Lab::open(&name).ok());
    let mut notes = Vec::new();
    let mut nodes = Vec::new();
    let topology = lab.as_ref().map(Lab::topology);
    match (&lab, &topology) {
        (Some(lab), Some(topology)) => {
            for node in &topology.nodes {
                let run_dir = RunDir::new(lab.run_dir(node.index));
                let is_own = run_dir == own;
                let found = node_found(&node.name, &node.proxy_name, run_dir).await;
                match found {
                    Ok(found) if is_own => nodes.insert(0, found),
                    Ok(found) => nodes.push(found),
                    Err(error) if is_own => return Err(error),
                    Err(error) => notes.push(format!("{}: {error:#}", node.name)),
                }
            }
        }
        _ => nodes.push(node_found(ON_NODE, IN_PROXY, own).await?),
    }
    let mut found = Found {
        pods: pods_of(&nodes, topology.as_deref()),
        nodes,
        topology,
        notes,
    };
    if found.nodes.is_empty() {
        return Err(anyhow!("no node of the lab answers"));
    }
    if found.topology.is_none() {
        found.notes.push(
            "only this node is known; what another node does with a packet is not told".to_owned(),
        );
    }
    Ok(found)
}

fn pods_of(nodes: &[NodeFound], topology: Option<&Topology>) -> Vec<PodFound> {
    let mut pods = Vec::new();
    for (index, node) in nodes.iter().enumerate() {
        for shown in &node.pods {
            pods.push(PodFound {
                name: format!("{}/{}", shown.pod.namespace, shown.pod.name),
                node: index,
                addresses: shown.pod.addresses.clone(),
                netns: shown.pod.netns.clone(),
                capture: Some(shown.pod.mode),
            });
        }
        let lab = topology;
        let of_lab = lab.and_then(|lab| lab.nodes.iter().find(|it| it.name == node.name));
        for pod in of_lab.into_iter().flat_map(|it| &it.pods) {
            let name = format!("{}/{}", pod.namespace, pod.name);
            if !pods.iter().any(|known| known.name == name) {
                pods.push(PodFound {
                    name,
                    node: index,
                    addresses: lab.map_or_else(Vec::new, |lab| lab.families.addresses(pod.ip)),
                    netns: Netns::path_of(&pod.netns),
                    capture: None,
                });
            }
        }
    }
    pods
}

async fn node_found(name: &str, proxy_name: &str, run_dir: RunDir) -> anyhow::Result<NodeFound> {
    let pods: Vec<ShownPod> = agent_client::get_of(&run_dir, "/v1/pods").await?;
    let plans: Vec<PlacedPlan> = agent_client::get_of(&run_dir, "/v1/plan?node").await?;
    let pid = agent_client::pid(&run_dir).await;
    let open = |label: &str| -> Option<Netns> {
        let placed = plans.iter().filter(|placed| placed.place == label);
        let mut found = placed.filter_map(|placed| {
            let by_path = placed
                .netns
                .as_ref()
                .and_then(|path| Netns::open(path).ok());
            by_path.or_else(|| Netns::open(held(pid?, placed.descriptor?)).ok())
        });
        found.next()
    };
    let netns = match open(ON_NODE) {
        Some(netns) => netns,
        None => Netns::current()?,
    };
    let proxy = open(IN_PROXY);
    let mesh = mesh_of(&run_dir).await.ok();
    Ok(NodeFound {
        name: name.to_owned(),
        proxy_name: proxy_name.to_owned(),
        run_dir,
        netns,
        proxy,
        pods,
        plans,
        mesh,
    })
}

/// Where a descriptor that another process holds can be opened.
fn held(pid: i32, descriptor: RawFd) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/fd/{descriptor}"))
}

async fn mesh_of(run_dir: &RunDir) -> anyhow::Result<Mesh> {
    let mut proxies = proxy_client::all_in(run_dir.path()).await?;
    let proxy = proxies.pop().context("no proxy")?;
    let section = async |name: &str| -> anyhow::Result<Value> {
        proxy.get(&format!("/config_dump?section={name}")).await
    };
    Mesh::of_dump(
        section("workloads").await?,
        section("services").await?,
        section("policies").await?,
    )
}

/// A namespace to be read, with the plans in it.
struct Wanted {
    name: String,
    netns: Netns,
    plans: Vec<Plan>,
    /// Nobody else writes rules there.
    exclusive: bool,
}

impl Found {
    /// Reads the state of the nodes and of these pods (by index), and of the host outside where it takes part.
    ///
    /// # Errors
    /// When a namespace cannot be read.
    pub async fn stage(&self, pods: &[usize], outside: bool) -> anyhow::Result<Stage> {
        let mut wanted: Vec<Wanted> = Vec::new();
        let mut nodes = Vec::new();
        for node in &self.nodes {
            let plans = |label: &str| -> Vec<Plan> {
                let here = node.plans.iter().filter(|placed| placed.place == label);
                here.map(|placed| placed.plan.clone()).collect()
            };
            let place = wanted.len();
            wanted.push(Wanted {
                name: node.name.clone(),
                netns: node.netns.clone(),
                plans: plans(ON_NODE),
                exclusive: false,
            });
            let proxy = node.proxy.as_ref().map(|netns| {
                wanted.push(Wanted {
                    name: node.proxy_name.clone(),
                    netns: netns.clone(),
                    plans: plans(IN_PROXY),
                    exclusive: true,
                });
                wanted.len() - 1
            });
            nodes.push(Node {
                place,
                proxy,
                tunnel: is_tunnel(&plans(IN_PROXY)),
                mesh: node.mesh.clone(),
            });
        }
        let mut places_of: BTreeMap<usize, usize> = BTreeMap::new();
        for index in pods {
            let pod = &self.pods[*index];
            let placed = self.plans_of(pod).await;
            let node = &nodes[pod.node];
            let mut in_pod = Vec::new();
            for PlacedPlan { place, plan, .. } in placed {
                match place.as_str() {
                    ON_NODE => wanted[node.place].plans.push(plan),
                    IN_PROXY => {
                        if let Some(proxy) = node.proxy {
                            wanted[proxy].plans.push(plan);
                        }
                    }
                    _ => in_pod.push(plan),
                }
            }
            let netns = Netns::open(&pod.netns)
                .with_context(|| format!("the namespace of pod {}", pod.name))?;
            places_of.insert(*index, wanted.len());
            wanted.push(Wanted {
                name: format!("pod {}", pod.name),
                netns,
                plans: in_pod,
                exclusive: true,
            });
        }
        if let Some(topology) = self.topology.as_ref().filter(|_| outside) {
            wanted.push(Wanted {
                name: "outside".to_owned(),
                netns: Netns::open(Netns::path_of(&topology.outside_netns))?,
                plans: Vec::new(),
                exclusive: false,
            });
        }
        let states = join_all(wanted.iter().map(|it| read(&it.netns)));
        let states: anyhow::Result<Vec<State>> = states
            .await
            .into_iter()
            .zip(&wanted)
            .map(|(state, it)| state.with_context(|| format!("reading {}", it.name)))
            .collect();
        let (mut live, mut planned) = (World::default(), World::default());
        for (state, it) in states?.into_iter().zip(&wanted) {
            let ruleset = planned::ruleset(&it.plans)
                .with_context(|| format!("planned tables of nftables in {}", it.name))?;
            let own = Arc::new(planned::own_rules(&it.plans, &ruleset));
            let place = |state: State| Place {
                name: it.name.clone(),
                state: Arc::new(state),
                own: Arc::clone(&own),
                tracking: Default::default(),
                sockets: Vec::new(),
            };
            planned.places.push(place(planned::as_planned(
                &state,
                &it.plans,
                &ruleset,
                it.exclusive,
            )));
            live.places.push(place(state));
        }
        let pods = self.pods.iter().enumerate().map(|(index, pod)| Pod {
            name: pod.name.clone(),
            addresses: pod.addresses.clone(),
            node: pod.node,
            place: places_of.get(&index).copied(),
            capture: pod.capture,
            style: places_of
                .get(&index)
                .map_or("", |place| style(&wanted[*place].plans)),
        });
        let pods: Vec<Pod> = pods.collect();
        Ok(Stage {
            namespaces: wanted.into_iter().map(|it| it.netns).collect(),
            live,
            planned,
            nodes,
            pods,
        })
    }

    async fn plans_of(&self, pod: &PodFound) -> Vec<PlacedPlan> {
        if pod.capture.is_none() {
            return Vec::new();
        }
        let uri = format!("/v1/plan?pod={}", pod.name);
        agent_client::get_of(&self.nodes[pod.node].run_dir, &uri)
            .await
            .unwrap_or_default()
    }
}

/// Which rules an in-pod capture has written.
fn style(plans: &[Plan]) -> &'static str {
    let mut steps = plans.iter().flat_map(|plan| &plan.steps);
    let tproxy = |step: &Step| match step {
        Step::Chain(chain) => chain.rules.iter().any(|rule| rule.contains("-j TPROXY")),
        _ => false,
    };
    if steps.clone().any(|step| matches!(step, Step::NftTable(_))) {
        "nftables"
    } else if steps.any(tproxy) {
        "tproxy"
    } else {
        "redirect"
    }
}

/// Whether the plan in the proxy's namespace has a way for the answers of its listeners.
fn is_tunnel(plans: &[Plan]) -> bool {
    let mark = node_redirect::facts::MARK_SOCKET_OUTBOUND;
    plans
        .iter()
        .flat_map(|plan| &plan.steps)
        .any(|step| matches!(step, Step::Rule(rule) if rule.fwmark == Some(mark)))
}

/// The state of a namespace, with what a dump leaves out.
async fn read(netns: &Netns) -> anyhow::Result<State> {
    let dump = host_net::dump::dump(netns).await?;
    let mut state = State::parse(&dump);
    if !state.not_evaluated.is_empty() {
        state.put(&nft::read(netns)?);
    }
    if let Ok(forwarding) = host_net::sysctl::read(netns, FORWARDING6) {
        state.sysctls.insert(FORWARDING6.to_owned(), forwarding);
    }
    let links = Netlink::connect(netns).await?.links().await?;
    for device in &mut state.devices {
        if let Some(link) = links.iter().find(|link| link.name == device.name) {
            device.index = link.index;
            device.peer = link.peer;
        }
    }
    state.listeners = Listeners::of(netns)?.now()?;
    Ok(state)
}
