//! containerd, and `ctr` as its user, in a mount namespace in which the fixed paths of both are theirs alone.

use std::fs;
use std::net::Ipv4Addr;
use std::time::Duration;

use lab::standing::{Background, Lab};

use super::{IMAGE, Place, Wiring, fetch, install, network, plugins_in};
use crate::harness::eventually;
use crate::runtime::Done;

/// How long containerd may take to start.
const STARTS_WITHIN: Duration = Duration::from_secs(60);
/// How long a container may take to run or to end.
const CHANGES_WITHIN: Duration = Duration::from_secs(60);

/// A containerd on one node.
pub struct Containerd<'a> {
    lab: &'a Lab,
    // Its script calls containerd, so it goes first.
    place: Place,
    _containerd: Background,
}

/// A container in the foreground of its `ctr run`.
pub struct Running {
    ctr: Background,
    name: String,
}

impl<'a> Containerd<'a> {
    /// Starts it and imports an image.
    pub fn new(lab: &'a Lab, node: u8, image: &str) -> Self {
        let place = Place::new(
            lab,
            node,
            "containerd",
            "for task in $(\"$dir/ctr\" task ls -q); do \"$dir/ctr\" task kill -s KILL \"$task\"; done\n\
             sleep 1; for task in $(\"$dir/ctr\" task ls -q); do \"$dir/ctr\" task delete -f \"$task\"; done\n\
             kill \"$(cat \"$dir/pid\")\"\n\
             cat /sys/fs/cgroup/*/$group/cgroup.procs /sys/fs/cgroup/*/$group/*/cgroup.procs | sort -u | xargs -r kill -9",
        );
        let dir = place.dir.display().to_string();
        plugins_in(&place.path("plugins"));
        fs::create_dir(place.path("net.d")).unwrap();
        let list = network(lab, &place.dir, node, Wiring::Ptp, true);
        fs::write(place.path("net.d/10-mesh.conflist"), list.to_string()).unwrap();
        install(lab, &place, node, "10-mesh.conflist");
        let settings = format!(
            "version = 2\nroot = \"{dir}/root\"\nstate = \"{dir}/state\"\n\
             disabled_plugins = [\"io.containerd.grpc.v1.cri\", \"io.containerd.snapshotter.v1.aufs\", \
             \"io.containerd.snapshotter.v1.btrfs\", \"io.containerd.snapshotter.v1.devmapper\", \
             \"io.containerd.snapshotter.v1.zfs\", \"io.containerd.tracing.processor.v1.otlp\", \
             \"io.containerd.internal.v1.tracing\", \"io.containerd.internal.v1.opt\"]\n\
             [grpc]\naddress = \"{dir}/containerd.sock\"\n[ttrpc]\naddress = \"{dir}/ttrpc.sock\"\n"
        );
        fs::write(place.path("config.toml"), settings).unwrap();
        // The paths of the plugins, their configuration, their results and the sockets of containers cannot be chosen.
        place.program(
            "containerd",
            &format!(
                "set -e; echo $$ > {dir}/pid; mkdir -p /etc/cni/net.d /run/containerd /var/lib/cni\n\
                 mount --bind {dir}/net.d /etc/cni/net.d; mount --bind {dir}/plugins /usr/lib/cni\n\
                 mount -t tmpfs ambidex /run/containerd; mount -t tmpfs ambidex /var/lib/cni\n\
                 exec containerd --config {dir}/config.toml"
            ),
        );
        place.program(
            "ctr",
            &format!(
                "exec nsenter --mount=/proc/$(cat {dir}/pid)/ns/mnt ctr --address {dir}/containerd.sock \"$@\""
            ),
        );
        let program = place.path("containerd").display().to_string();
        let argv = ["unshare", "--mount", "--propagation", "slave", &program];
        let mut containerd = lab.spawn(&place.node, "containerd", &argv).unwrap();
        containerd
            .wait_for("containerd successfully booted", STARTS_WITHIN)
            .unwrap();
        let this = Self {
            lab,
            place,
            _containerd: containerd,
        };
        this.call(&["images", "import", "--snapshotter", "native", image])
            .with_code(0);
        this
    }

    /// Calls `ctr`.
    pub fn call(&self, arguments: &[&str]) -> Done {
        self.place.call(self.lab, "ctr", arguments)
    }

    /// Runs the web server in a container, attached to the network, in the foreground of a process of its own.
    pub fn run(&self, name: &str) -> Running {
        let program = self.place.path("ctr").display().to_string();
        let group = format!("{}/{name}", self.place.cgroup());
        let argv = [
            &program,
            "run",
            "--rm",
            "--cni",
            "--snapshotter",
            "native",
            "--cgroup",
            &group,
            IMAGE,
            name,
        ];
        let label = format!("ctr-{name}");
        let ctr = self.lab.spawn(&self.place.node, &label, &argv).unwrap();
        Running {
            ctr,
            name: name.to_owned(),
        }
    }

    /// Names of the containers with a process.
    pub fn running(&self) -> Vec<String> {
        let tasks = self.call(&["tasks", "list"]).with_code(0);
        let running = tasks.lines().filter(|line| line.ends_with("RUNNING"));
        running
            .map(|line| line.split_whitespace().next().unwrap().to_owned())
            .collect()
    }

    /// Waits until a container runs.
    pub fn wait_running(&self, container: &Running) {
        let what = format!("{} runs", container.name);
        eventually(&what, CHANGES_WITHIN, || {
            assert!(!container.has_ended(), "{}", container.ctr.output());
            self.running().contains(&container.name)
        });
    }

    /// Kills a container and waits until its `ctr run` has taken everything down.
    pub fn remove(&self, container: &Running) {
        self.call(&["tasks", "kill", "--signal", "KILL", &container.name])
            .with_code(0);
        let what = format!("{} is gone", container.name);
        eventually(&what, CHANGES_WITHIN, || container.has_ended());
    }

    /// Removes what `ctr run` leaves when the network refuses a container: the task that it made and did not start.
    pub fn forget(&self, name: &str) {
        self.call(&["tasks", "delete", "--force", name])
            .with_code(0);
        self.call(&["containers", "delete", name]).with_code(0);
    }

    /// Fetches a page from inside a container.
    pub fn fetch(&self, container: &str, from: Ipv4Addr, path: &str) -> Done {
        let script = fetch(from, path);
        self.call(&[
            "tasks",
            "exec",
            "--exec-id",
            "fetch",
            container,
            "sh",
            "-c",
            &script,
        ])
    }
}

impl Running {
    /// Whether its `ctr run` is over.
    pub fn has_ended(&self) -> bool {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.ctr.pid()));
        // Our own child stays a zombie until it is asked for.
        stat.map_or(true, |stat| {
            stat.rsplit(") ").next().unwrap().starts_with('Z')
        })
    }

    /// What it wrote, when it has ended by itself.
    pub fn failure(&self) -> String {
        eventually("ctr run ends", CHANGES_WITHIN, || self.has_ended());
        self.ctr.output()
    }
}
