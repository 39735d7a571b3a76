#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::time::SystemTime;

use tempfile::TempDir;

use super::*;

/// A directory with files, read through one [`Directory`].
struct Watched {
    dir: TempDir,
    directory: Directory,
}

fn workload(uid: &str, last: u8) -> String {
    format!("- {{uid: {uid}, namespace: a, workloadIps: [10.0.0.{last}], services: {{}}}}\n")
}

fn workloads(list: &[(&str, u8)]) -> String {
    let lines = list.iter().map(|(uid, last)| workload(uid, *last));
    format!("workloads:\n{}", lines.collect::<String>())
}

impl Watched {
    fn new(files: &[(&str, &str)]) -> Self {
        let dir = TempDir::new().unwrap();
        let directory = Directory::new(dir.path());
        let mut watched = Self { dir, directory };
        for (name, text) in files {
            watched.write(name, text);
        }
        watched.read().unwrap();
        watched
    }

    fn write(&mut self, name: &str, text: &str) {
        let path = self.dir.path().join(name);
        fs::write(&path, text).unwrap();
        // Writes of the same length within the clock's grain would look the same.
        let later = SystemTime::now() + Duration::from_secs(text.len() as u64);
        fs::File::open(&path).unwrap().set_modified(later).unwrap();
    }

    fn read(&mut self) -> Result<(usize, Vec<Change>), DirectoryError> {
        self.directory.read(&look(self.dir.path()).unwrap())
    }

    /// The mesh as texts, and as one that is made of the same files at once.
    fn assert_whole(&self) {
        let mut whole = Directory::new(self.dir.path());
        whole.read(&look(self.dir.path()).unwrap()).unwrap();
        let objects = |mesh: &Snapshot| {
            let workloads = mesh.workloads().map(|w| format!("{w:?}"));
            let services = mesh.services().map(|s| format!("{s:?}"));
            let policies = mesh.policies().map(|p| format!("{p:?}"));
            workloads
                .chain(services)
                .chain(policies)
                .collect::<Vec<_>>()
        };
        assert_eq!(objects(self.directory.mesh()), objects(whole.mesh()));
    }

    fn uids(&self) -> Vec<String> {
        let mesh = self.directory.mesh();
        mesh.workloads().map(|w| w.uid.to_string()).collect()
    }
}

/// What changes, in short.
fn short(changes: &[Change]) -> Vec<String> {
    changes
        .iter()
        .map(|change| match change {
            Change::Workload(w) => format!("+{}", w.uid),
            Change::RemoveWorkload(uid) => format!("-{uid}"),
            Change::Service(s) => format!("+{}", s.key()),
            Change::RemoveService(key) => format!("-{key}"),
            Change::Policy(p) => format!("+{}", p.key()),
            Change::RemovePolicy(key) => format!("-{key}"),
        })
        .collect()
}

#[test]
fn only_files_that_change_are_read_and_only_objects_that_change_count() {
    let mut watched = Watched::new(&[
        ("one.yaml", &workloads(&[("a", 1), ("b", 2)])),
        ("two.yaml", &workloads(&[("c", 3)])),
    ]);
    assert_eq!(watched.read().unwrap().0, 0);
    watched.write("one.yaml", &workloads(&[("a", 1), ("b", 22), ("d", 4)]));
    let (read, changes) = watched.read().unwrap();
    assert_eq!(
        (read, short(&changes)),
        (1, vec!["-b".into(), "+b".into(), "+d".into()])
    );
    // A file that is touched changes nothing.
    watched.write(
        "two.yaml",
        &format!("# touched\n{}", workloads(&[("c", 3)])),
    );
    let (read, changes) = watched.read().unwrap();
    assert_eq!((read, changes.len()), (1, 0));
    watched.assert_whole();
}

#[test]
fn files_and_objects_that_go_or_move() {
    let service = "services:\n- {name: web, namespace: a, hostname: web, vips: [/10.1.0.1], ports: {80: 80}}\n";
    let policy = "policies: [{name: p, namespace: a, scope: Namespace, action: Deny, dryRun: false, rules: []}]\n";
    let mut watched = Watched::new(&[
        ("one.yaml", &workloads(&[("a", 1), ("b", 2)])),
        ("two.yaml", &workloads(&[("c", 3)])),
        ("three.yaml", &format!("{service}{policy}")),
    ]);
    // A workload goes to another file, unchanged; another one takes its address there.
    watched.write("one.yaml", &workloads(&[("b", 2)]));
    watched.write("two.yaml", &workloads(&[("a", 1), ("c", 3)]));
    assert_eq!(short(&watched.read().unwrap().1), [""; 0]);
    watched.write("one.yaml", &workloads(&[("b", 1)]));
    watched.write("two.yaml", &workloads(&[("a", 2), ("c", 3)]));
    assert_eq!(short(&watched.read().unwrap().1), ["-a", "-b", "+b", "+a"]);
    let by_ip = watched
        .directory
        .mesh()
        .workload_by_ip([10, 0, 0, 1].into());
    assert_eq!(&*by_ip.unwrap().uid, "b");
    // A file is renamed: the same objects under another name.
    fs::rename(
        watched.dir.path().join("two.yaml"),
        watched.dir.path().join("four.yml"),
    )
    .unwrap();
    assert_eq!(short(&watched.read().unwrap().1), [""; 0]);
    watched.assert_whole();
    fs::remove_file(watched.dir.path().join("four.yml")).unwrap();
    fs::remove_file(watched.dir.path().join("three.yaml")).unwrap();
    assert_eq!(
        short(&watched.read().unwrap().1),
        ["-a/web", "-a/p", "-a", "-c"]
    );
    assert_eq!(watched.uids(), ["b"]);
    watched.assert_whole();
}

#[test]
fn what_contradicts_itself_or_cannot_be_read_changes_nothing_until_it_is_mended() {
    let mut watched = Watched::new(&[
        ("one.yaml", &workloads(&[("a", 1)])),
        ("two.yaml", &workloads(&[("b", 2)])),
    ]);
    for (text, why) in [
        (
            workloads(&[("b", 2), ("a", 3)]),
            "workload a is there twice",
        ),
        (workloads(&[("b", 1)]), "both have address /10.0.0.1"),
        // The same object, word for word, in two files.
        (
            workloads(&[("b", 2), ("a", 1)]),
            "workload a is there twice",
        ),
        ("workloads: [".to_owned(), "two.yaml"),
    ] {
        watched.write("two.yaml", &text);
        let error = watched.read().unwrap_err().to_string();
        assert!(error.contains(why), "{error}: not {why:?}");
        assert_eq!(watched.uids(), ["a", "b"]);
    }
    // Both files are read again, and the object may be in either.
    watched.write("one.yaml", "");
    watched.write("two.yaml", &workloads(&[("b", 2), ("a", 1)]));
    assert_eq!(watched.read().unwrap().0, 2);
    assert_eq!(watched.uids(), ["a", "b"]);
    watched.assert_whole();
    // An object that two changed files hold is a contradiction too, though one of them held it before.
    watched.write("one.yaml", &workloads(&[("a", 1)]));
    watched.write("two.yaml", &workloads(&[("b", 2), ("a", 1), ("c", 3)]));
    assert!(watched.read().is_err());
}
