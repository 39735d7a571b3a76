//! podman with CNI networks, its images and its state in a directory of its own.

use std::fs;
use std::net::Ipv4Addr;
use std::process::Command;

use lab::standing::Lab;

use super::{IMAGE, Place, Wiring, fetch, install, network, network_name, plugins_in};
use crate::runtime::Done;

/// A podman on one node.
pub struct Podman<'a> {
    lab: &'a Lab,
    place: Place,
}

impl<'a> Podman<'a> {
    /// Sets it up and builds the image. The containers' web server has one page, `/page`.
    pub fn new(lab: &'a Lab, node: u8, page: &str) -> Self {
        let place = Place::new(
            lab,
            node,
            "podman",
            "\"$dir/podman\" rm --all --force --time 0; \"$dir/podman\" rmi --all --force\n\
             cat /sys/fs/cgroup/*/$group/cgroup.procs /sys/fs/cgroup/*/$group/*/cgroup.procs | sort -u | xargs -r kill -9",
        );
        let dir = place.dir.display().to_string();
        plugins_in(&place.path("plugins"));
        fs::create_dir(place.path("net.d")).unwrap();
        for (wiring, captured) in [
            (Wiring::Ptp, true),
            (Wiring::Ptp, false),
            (Wiring::Bridge, true),
            (Wiring::Bridge, false),
        ] {
            let list = network(lab, &place.dir, node, wiring, captured);
            let file = format!("{}.conflist", network_name(lab, wiring, captured));
            fs::write(place.path("net.d").join(&file), list.to_string()).unwrap();
            if captured {
                install(lab, &place, node, &file);
            }
        }
        // Locks in files: those in shared memory would be one set with every other podman of the machine.
        let settings = format!(
            "[containers]\nlog_driver = \"none\"\ndefault_sysctls = []\n\
             [network]\nnetwork_backend = \"cni\"\ncni_plugin_dirs = [\"{dir}/plugins\"]\nnetwork_config_dir = \"{dir}/net.d\"\n\
             [engine]\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"none\"\nlock_type = \"file\"\nruntime = \"runc\"\n\
             tmp_dir = \"{dir}/tmp\"\nstatic_dir = \"{dir}/static\"\nvolume_path = \"{dir}/volumes\"\n"
        );
        fs::write(place.path("containers.conf"), settings).unwrap();
        place.program(
            "podman",
            &format!(
                "CONTAINERS_CONF={dir}/containers.conf TMPDIR={dir} exec podman --root {dir}/root --runroot {dir}/runroot \
                 --tmpdir {dir}/tmp --storage-driver vfs --cgroup-manager cgroupfs --runtime runc \"$@\""
            ),
        );
        let podman = Self { lab, place };
        podman.build_image(page);
        podman
    }

    fn build_image(&self, page: &str) {
        let context = self.place.path("image");
        let root = context.join("root");
        for part in ["bin", "www", "tmp"] {
            fs::create_dir_all(root.join(part)).unwrap();
        }
        fs::copy("/bin/busybox", root.join("bin/busybox")).expect("busybox-static");
        for applet in ["sh", "httpd", "nc"] {
            std::os::unix::fs::symlink("busybox", root.join("bin").join(applet)).unwrap();
        }
        fs::write(root.join("www/page"), page).unwrap();
        let recipe = "FROM scratch\nADD root.tar /\nENV PATH=/bin\n\
                      CMD [\"httpd\", \"-f\", \"-p\", \"8080\", \"-h\", \"/www\"]\n";
        fs::write(context.join("Containerfile"), recipe).unwrap();
        let (archive, root) = (context.join("root.tar"), root.as_os_str());
        let mut pack = Command::new("tar");
        pack.arg("-C").arg(root).arg("-cf").arg(&archive).arg(".");
        assert!(pack.status().unwrap().success());
        let context = context.to_str().unwrap();
        self.call(&[
            "build",
            "--quiet",
            "--isolation",
            "chroot",
            "--tag",
            IMAGE,
            context,
        ])
        .with_code(0);
    }

    /// Calls podman.
    pub fn call(&self, arguments: &[&str]) -> Done {
        self.place.call(self.lab, "podman", arguments)
    }

    /// Runs the web server in a container.
    pub fn run(&self, name: &str, wiring: Wiring, captured: bool) -> Done {
        let network = network_name(self.lab, wiring, captured);
        let group = self.place.cgroup();
        self.call(&[
            "run",
            "--detach",
            "--name",
            name,
            "--network",
            &network,
            "--cgroup-parent",
            &group,
            "--ulimit",
            "nofile=1024:1024",
            "--ulimit",
            "nproc=1024:1024",
            IMAGE,
        ])
    }

    /// Removes a container.
    #[track_caller]
    pub fn remove(&self, name: &str) {
        self.call(&["rm", "--force", "--time", "0", name])
            .with_code(0);
    }

    /// Fetches a page from inside a container.
    pub fn fetch(&self, container: &str, from: Ipv4Addr, path: &str) -> Done {
        self.call(&["exec", container, "sh", "-c", &fetch(from, path)])
    }

    /// Writes the image into a file that other runtimes read.
    pub fn save(&self) -> String {
        let file = self.place.path("image.tar").display().to_string();
        self.call(&[
            "save",
            "--quiet",
            "--format",
            "docker-archive",
            "--output",
            &file,
            IMAGE,
        ])
        .with_code(0);
        file
    }
}
