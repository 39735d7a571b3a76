//! Listings held beside those typed by hand, where the tunnels are of the kind that the articles show.

use anyhow::{Result, bail};
use lab::topology::NodeFlow;

use crate::listings::{Golden, Met, Names, Situation, compare};
use crate::suite::{COMMAND_LIMIT, Suite};

const DEVICES: &str = include_str!("../golden/geneve-devices.txt");
const NODE_1_20: &str = include_str!("../golden/node-1.20.txt");

/// The four devices, and the node's and the proxy's objects by iptables-legacy.
pub fn listings(suite: &mut Suite, flow: NodeFlow) -> Result<()> {
    let situation = match flow {
        NodeFlow::Hybrid => Situation::Hybrid,
        NodeFlow::Tunnel => Situation::Tunnel,
    };
    let lab = suite.lab(flow)?;
    let names = Names::of(&lab.topology());
    let mut met = Met::default();
    for (name, text) in [("devices", DEVICES), ("1.20", NODE_1_20)] {
        let golden = Golden::parse(name, text)?;
        compare(&golden, &names, situation, &mut met, |place, command| {
            let target = match place {
                "node" => "node1",
                "proxy" => "proxy1",
                other => bail!("no place {other:?}"),
            };
            // This kernel has iptables-legacy only; the plain names may be the other variant's.
            let command = command.replace("iptables-save", "iptables-legacy-save");
            let said = lab.run(target, &["sh", "-c", &command], COMMAND_LIMIT)?;
            // A table without routes may not be there.
            if said.stderr.contains("FIB table does not exist") {
                return Ok(String::new());
            }
            Ok(said.success(&command)?.stdout)
        })?;
    }
    for name in [
        "length of queue, in detail",
        "length of queue, in detail, of the other one",
    ] {
        if !met.0.contains(name) {
            bail!("not met: {name}");
        }
    }
    Ok(())
}
