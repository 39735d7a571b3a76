//! Removal: what the capture made goes, and nothing else.

use anyhow::{Result, ensure};
use host_net::dump::Dump;
use host_net::netns::Netns;
use lab::standing::{self, Daemon};
use lab::topology::NodeFlow;

use crate::suite::{Suite, ambidex_in};

/// `undo --node` leaves node and proxy as the agent found them; after `lab down` so is the machine. With the flow
/// `tunnel` the agent has been killed before, so that its journal is all there is to go by.
pub fn leaves_nothing(suite: &mut Suite, flow: NodeFlow) -> Result<()> {
    let lab = suite.take_lab(flow)?;
    let bare = suite.bare()?;
    if flow == NodeFlow::Tunnel {
        lab.kill(1, Daemon::Agent)?;
    }
    let undone = ambidex_in(&lab, "node1", &["undo", "--node"])?.success("undo --node")?;
    for plan in ["host-node", "proxy-node"] {
        ensure!(
            undone.stdout.contains(&format!("removed {plan}\n")),
            "undo --node did not say that it removed {plan}: {}",
            undone.stdout
        );
    }
    for (before, target) in bare.iter().zip(["node1", "proxy1"]) {
        same(target, before, &suite.dump(&lab.netns(target)?)?)?;
    }

    lab.down()?;
    let left = Netns::list_named()?;
    ensure!(left.is_empty(), "network namespaces are left: {left:?}");
    let left = standing::list()?;
    ensure!(left.is_empty(), "labs are left: {left:?}");
    same(
        "the machine",
        &suite.machine_before,
        &suite.dump(&Netns::current()?)?,
    )
}

fn same(what: &str, before: &Dump, after: &Dump) -> Result<()> {
    let difference = before.diff(after);
    ensure!(
        difference.is_empty(),
        "{what} is not as before:\n{}",
        difference.join("\n")
    );
    Ok(())
}
