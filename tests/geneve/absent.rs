//! A kernel without geneve: whoever insists on it is told so at once.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use host_net::netns::Netns;

use crate::suite::Suite;

/// The kernel starts this program to load a module.
const LOADER: &str = "/proc/sys/kernel/modprobe";
const SENTENCE: &str =
    "error: this kernel has no geneve: load the module (modprobe geneve) or use --overlay vxlan\n";

/// `--overlay geneve` fails with one sentence that names both ways out, and leaves nothing. Then the module is loaded,
/// which is the way out that all other tests take; `vxlan` is the one that every kernel takes.
pub fn one_sentence(suite: &mut Suite) -> Result<()> {
    let loader = fs::read_to_string(LOADER).context(LOADER)?;
    ensure!(
        !Path::new("/sys/module/geneve").exists(),
        "geneve is loaded before its time"
    );
    fs::write(LOADER, "/bin/false").context(LOADER)?;
    let told = told(suite);
    fs::write(LOADER, &loader).context(LOADER)?;
    told?;
    let loaded = Command::new(loader.trim()).arg("geneve").status()?;
    ensure!(loaded.success(), "modprobe geneve: {loaded}");
    ensure!(
        Path::new("/sys/module/geneve").exists(),
        "geneve is not loaded"
    );
    Ok(())
}

fn told(suite: &Suite) -> Result<()> {
    let commands: [&[&str]; 4] = [
        &["lab", "up", "--name", "absent", "--mode", "node"],
        &["lab", "up", "--name", "absent", "--mode", "mixed"],
        &["agent", "--mode", "node"],
        &["bench", "--quick", "--out", "/run/absent/bench"],
    ];
    for command in commands {
        let output = Command::new(suite.ambidex())
            .args(command)
            .args(["--overlay", "geneve"])
            .env("AMBIDEX_RUN_DIR", "/run/absent")
            .env("AMBIDEX_STATE_DIR", "/run/absent")
            .output()
            .with_context(|| suite.ambidex().display().to_string())?;
        let told = String::from_utf8_lossy(&output.stderr);
        let command = command.join(" ");
        ensure!(told == SENTENCE, "{command}: {told}");
        ensure!(
            output.status.code() == Some(1),
            "{command}: {}",
            output.status
        );
    }
    ensure!(
        !Path::new("/run/absent").exists(),
        "something is left in /run"
    );
    let left = Netns::list_named()?;
    ensure!(left.is_empty(), "network namespaces are left: {left:?}");
    Ok(())
}
