//! Listings held beside those typed by hand, where the tunnels are of the kind that the articles show.

use anyhow::{Result, bail};
use lab::topology::NodeFlow;

use crate::listings::{Golden, Met, Names, Situation, compare};
use crate::suite::{COMMAND_LIMIT, Suite};

const DEVICES: &str = include_str!("../golden/geneve-devices.txt");
const NODE_1_20: &str = include_str!("../golden/node-1.20.txt");

/// The four devices, and the node's and the proxy's objects by iptables-legacy.
pub fn tunnel(suite: &mut Suite) -> Result<()> {
    let lab = suite.lab(NodeFlow::Tunnel)?;
    let names = Names::of(&lab.topology());
    let mut met = Met::default();
    for (name, text) in [("devices", DEVICES), ("1.20", NODE_1_20)] {
        let golden = Golden::parse(name, text)?;
        compare(
            &golden,
            &names,
            Situation::Tunnel,
            &mut met,
            |place, command| {
                let target = match place {
                    "node" => "node1",
                    "proxy" => "proxy1",
                    other => bail!("no place {other:?}"),
                };
                // This kernel has iptables-legacy only; the plain names may be the other variant's.
                let command = command.replace("iptables-save", "iptables-legacy-save");
                let said = lab.run(target, &["sh", "-c", &command], COMMAND_LIMIT)?;
                Ok(said.success(&command)?.stdout)
            },
        )?;
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
