//! `ambidex cni install` and `uninstall` on directories as runtimes have them.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

/// Far more than a second, in which the watch looks.
const SEEN_WITHIN: Duration = Duration::from_secs(30);

/// Directories of a runtime.
struct Machine {
    _root: TempDir,
    bin: PathBuf,
    conf: PathBuf,
}

impl Machine {
    fn new() -> Self {
        let root = TempDir::new().unwrap();
        let (bin, conf) = (root.path().join("bin"), root.path().join("net.d"));
        fs::create_dir(&bin).unwrap();
        fs::create_dir(&conf).unwrap();
        Self {
            _root: root,
            bin,
            conf,
        }
    }

    fn command(&self, verb: &str, more: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ambidex"));
        command
            .args(["cni", verb, "--bin-dir"])
            .arg(&self.bin)
            .arg("--conf-dir")
            .arg(&self.conf)
            .args(more)
            .env_remove("POD_NAMESPACE")
            .env("AMBIDEX_RUN_DIR", "/run/of-this-node");
        command
    }

    fn run(&self, verb: &str, more: &[&str]) -> Output {
        self.command(verb, more).output().unwrap()
    }

    #[track_caller]
    fn succeed(&self, verb: &str, more: &[&str]) -> String {
        let output = self.run(verb, more);
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.conf.join(name), text).unwrap();
    }

    fn read(&self, name: &str) -> Value {
        serde_json::from_slice(&fs::read(self.conf.join(name)).unwrap()).unwrap()
    }

    /// Types of the plugins in a list, in their order.
    fn chain(&self, name: &str) -> Vec<String> {
        let Ok(text) = fs::read(self.conf.join(name)) else {
            return Vec::new();
        };
        let list: Value = serde_json::from_slice(&text).expect("never half a file");
        let plugins = list["plugins"].as_array().unwrap();
        let types = plugins.iter().map(|p| p["type"].as_str().unwrap());
        types.map(str::to_owned).collect()
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.conf).unwrap();
        let mut names: Vec<String> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    fn plugin(&self) -> PathBuf {
        self.bin.join("ambidex-cni")
    }
}

const LIST: &str = r#"{"name":"net","cniVersion":"1.0.0","zone":{"b":1,"a":[2]},
  "plugins":[{"type":"ptp","ipam":{"type":"host-local"}},{"type":"portmap","capabilities":{"portMappings":true}}]}"#;

fn eventually(what: &str, so: impl Fn() -> bool) {
    let deadline = Instant::now() + SEEN_WITHIN;
    while !so() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn it_goes_behind_the_plugins_of_the_first_valid_network_and_out_again() {
    let machine = Machine::new();
    machine.write("00-broken.conf", "{");
    machine.write("01-empty.conflist", r#"{"name":"x","plugins":[]}"#);
    machine.write("05-readme.txt", LIST);
    machine.write("10-net.conflist", LIST);
    machine.write("20-other.conflist", LIST);
    let file = machine.conf.join("10-net.conflist");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();

    machine.succeed("install", &["--pod-namespace", "mesh"]);
    assert_eq!(
        machine.chain("10-net.conflist"),
        ["ptp", "portmap", "ambidex-cni"]
    );
    assert_eq!(machine.chain("20-other.conflist"), ["ptp", "portmap"]);
    let list = machine.read("10-net.conflist");
    assert_eq!(
        list["plugins"][2],
        json!({
            "type": "ambidex-cni", "capabilities": {"io.kubernetes.cri.pod-annotations": true}, "cni_agent_run_dir": "/run/of-this-node", "ambient_enabled": true,
            "exclude_namespaces": ["kube-system"], "pod_namespace": "mesh",
        })
    );
    assert_eq!(fs::metadata(&file).unwrap().mode() & 0o777, 0o640);
    assert_eq!(
        fs::metadata(machine.plugin()).unwrap().mode() & 0o777,
        0o755
    );

    // A repetition touches nothing; other settings take the place of the ones before.
    let untouched = fs::metadata(&file).unwrap().ino();
    let said = machine.succeed("install", &["--pod-namespace", "mesh"]);
    assert!(said.contains("everything was in place"), "{said}");
    assert_eq!(fs::metadata(&file).unwrap().ino(), untouched);
    machine.succeed("install", &["--exclude-namespaces", "a,b"]);
    assert_eq!(
        machine.chain("10-net.conflist"),
        ["ptp", "portmap", "ambidex-cni"]
    );
    let list = machine.read("10-net.conflist");
    assert_eq!(list["plugins"][2]["exclude_namespaces"], json!(["a", "b"]));

    machine.succeed("uninstall", &[]);
    let before: Value = serde_json::from_str(LIST).unwrap();
    assert_eq!(machine.read("10-net.conflist"), before);
    assert_eq!(machine.names().len(), 5, "{:?}", machine.names());
    assert!(!machine.plugin().exists());
    let said = machine.succeed("uninstall", &[]);
    assert!(said.contains("nothing was installed"), "{said}");
}

#[test]
fn a_single_plugin_becomes_a_list_and_comes_back_as_it_was() {
    let machine = Machine::new();
    let single = "{ \"cniVersion\":\"0.4.0\", \"name\":\"one\",\n\t\"type\":\"ptp\" }";
    machine.write("10-one.conf", single);
    machine.succeed("install", &[]);
    assert_eq!(machine.chain("10-one.conflist"), ["ptp", "ambidex-cni"]);
    let list = machine.read("10-one.conflist");
    assert_eq!(
        (&list["name"], &list["cniVersion"]),
        (&json!("one"), &json!("0.4.0"))
    );
    assert!(!machine.conf.join("10-one.conf").exists());
    machine.succeed("install", &["--conf-name", "10-one.conf"]);
    assert_eq!(machine.chain("10-one.conflist"), ["ptp", "ambidex-cni"]);
    machine.succeed("uninstall", &[]);
    assert_eq!(machine.names(), ["10-one.conf"]);
    assert_eq!(
        fs::read_to_string(machine.conf.join("10-one.conf")).unwrap(),
        single
    );
}

#[test]
fn a_list_of_our_own_leaves_the_networks_alone() {
    let machine = Machine::new();
    machine.write("10-net.conflist", LIST);
    machine.succeed("install", &["--owned"]);
    assert_eq!(
        fs::read_to_string(machine.conf.join("10-net.conflist")).unwrap(),
        LIST
    );
    assert_eq!(
        machine.chain("02-ambidex.conflist"),
        ["ptp", "portmap", "ambidex-cni"]
    );
    assert_eq!(
        machine.read("02-ambidex.conflist")["zone"],
        json!({"b": 1, "a": [2]})
    );
    let own = fs::metadata(machine.conf.join("02-ambidex.conflist")).unwrap();
    assert_eq!(own.mode() & 0o777, 0o600);

    // A runtime takes the first by name; a network that is before every name of ours cannot be had.
    machine.write("01-net.conflist", LIST);
    machine.succeed("install", &["--owned"]);
    assert_eq!(
        machine.chain("00-ambidex.conflist"),
        ["ptp", "portmap", "ambidex-cni"]
    );
    machine.write("00-a.conflist", LIST);
    let output = machine.run("install", &["--owned"]);
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(
        !output.status.success() && error.contains("00-a.conflist"),
        "{error}"
    );

    // The other form replaces this one.
    machine.succeed("install", &[]);
    assert_eq!(
        machine.chain("00-a.conflist"),
        ["ptp", "portmap", "ambidex-cni"]
    );
    assert!(!machine.conf.join("00-ambidex.conflist").exists());
    machine.succeed("uninstall", &[]);
    let names = machine.names();
    assert_eq!(
        names,
        ["00-a.conflist", "01-net.conflist", "10-net.conflist"]
    );
}

#[test]
fn alone_it_is_behind_every_network() {
    let machine = Machine::new();
    machine.succeed("install", &["--chained", "false"]);
    assert_eq!(machine.names(), ["YYY-ambidex.conf"]);
    assert_eq!(machine.read("YYY-ambidex.conf")["type"], "ambidex-cni");
    machine.succeed("uninstall", &[]);
    assert_eq!(machine.names(), [""; 0]);
}

#[test]
fn what_is_wrong_is_named() {
    let machine = Machine::new();
    let error = |more: &[&str]| {
        let output = machine.run("install", more);
        assert!(!output.status.success(), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(error(&[]).contains("no valid network configuration"));
    machine.write("10-net.conflist", "[]");
    assert!(error(&["--conf-name", "10-net.conflist"]).contains("not a JSON object"));
    assert!(error(&["--plugin", "/absent"]).contains("/absent"));
    assert!(error(&["--bin-dir", "/absent/bin"]).contains("/absent/bin"));
}

/// The plugin that a runtime executes at the moment is replaced all the same, and what a killed installer left goes.
#[test]
fn an_upgrade_replaces_a_plugin_that_runs() {
    let machine = Machine::new();
    machine.write("10-net.conflist", LIST);
    machine.succeed("install", &[]);
    let mut running = Command::new(machine.plugin())
        .env("CNI_COMMAND", "VERSION")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let newer = machine.conf.join("newer");
    let mut program = fs::read(machine.plugin()).unwrap();
    program.extend(b"a later version");
    fs::write(&newer, &program).unwrap();
    let stale = machine.bin.join(".ambidex-cni.ambidex-tmp.4194999");
    fs::write(&stale, "half").unwrap();
    machine.succeed("install", &["--plugin", newer.to_str().unwrap()]);
    assert_eq!(fs::read(machine.plugin()).unwrap(), program);
    assert!(!stale.exists());
    drop(running.stdin.take());
    let output = running.wait_with_output().unwrap();
    let version: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(version["supportedVersions"][0], "0.3.1");
}

/// A runtime that reads at any moment reads a whole configuration, with the plugin in it.
#[test]
fn no_reader_sees_half_of_it() {
    let machine = Machine::new();
    machine.write("10-net.conflist", LIST);
    machine.succeed("install", &[]);
    let over = AtomicBool::new(false);
    let reads = std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut reads = 0;
            while !over.load(Ordering::Relaxed) {
                assert_eq!(machine.chain("10-net.conflist").len(), 3);
                reads += 1;
            }
            reads
        });
        for turn in 0..10 {
            machine.succeed("install", &["--exclude-namespaces", &format!("n{turn}")]);
        }
        over.store(true, Ordering::Relaxed);
        reader.join().unwrap()
    });
    assert!(reads > 10, "{reads}");
}

/// A watching installer.
struct Watch(Child);

impl Watch {
    fn start(machine: &Machine, more: &[&str]) -> Self {
        let mut command = machine.command("install", more);
        command.arg("--watch").stdout(Stdio::null());
        Self(command.spawn().unwrap())
    }

    /// Ends as a pod's container does.
    fn terminate(mut self) -> bool {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.0.id()).unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        self.0.wait().unwrap().success()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn it_waits_for_a_network_and_goes_in_again_when_it_is_taken_out() {
    let machine = Machine::new();
    let installed = |name: &str| {
        machine
            .chain(name)
            .last()
            .is_some_and(|t| t == "ambidex-cni")
    };
    let watch = Watch::start(&machine, &[]);
    eventually("the binary is there", || machine.plugin().exists());
    assert_eq!(machine.names(), [""; 0]);
    replace(&machine.conf, "10-net.conflist", LIST);
    eventually("it goes in", || installed("10-net.conflist"));
    // The other CNI writes its file again, and then one that a runtime prefers.
    replace(&machine.conf, "10-net.conflist", LIST);
    eventually("it goes in again", || installed("10-net.conflist"));
    replace(&machine.conf, "05-net.conflist", LIST);
    eventually("it follows the runtime", || installed("05-net.conflist"));
    fs::remove_file(machine.plugin()).unwrap();
    eventually("the binary comes back", || machine.plugin().exists());
    assert!(watch.terminate());
    assert!(installed("05-net.conflist") && machine.plugin().exists());
}

#[test]
fn a_list_of_our_own_follows_the_network() {
    let machine = Machine::new();
    machine.write("10-net.conflist", LIST);
    let watch = Watch::start(&machine, &["--owned"]);
    let own = "02-ambidex.conflist";
    eventually("it is there", || !machine.chain(own).is_empty());
    replace(
        &machine.conf,
        "10-net.conflist",
        &LIST.replace("portmap", "bandwidth"),
    );
    eventually("it follows", || {
        machine.chain(own) == ["ptp", "bandwidth", "ambidex-cni"]
    });
    fs::remove_file(machine.conf.join(own)).unwrap();
    eventually("it comes back", || !machine.chain(own).is_empty());
    assert!(watch.terminate());
    assert_eq!(machine.chain(own).len(), 3);
}

/// As other CNIs write their files: beside and renamed.
fn replace(directory: &Path, name: &str, text: &str) {
    let aside = directory.join(format!(".{name}"));
    fs::write(&aside, text).unwrap();
    fs::rename(aside, directory.join(name)).unwrap();
}
