#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::path::Path;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::timeout;

use super::*;

fn mesh(workload: &str) -> String {
    format!(
        "workloads: [{{uid: {workload}, workloadIps: [10.0.0.1], namespace: a, services: {{}}}}]\n"
    )
}

fn in_force(store: &Store) -> String {
    store
        .load()
        .workloads()
        .map(|w| w.uid.to_string())
        .collect()
}

async fn changed(versions: &mut watch::Receiver<u64>) {
    timeout(Duration::from_secs(20), versions.changed())
        .await
        .expect("no other version within 20 s")
        .unwrap();
}

fn rename_over(path: &Path, text: &str) {
    let other = path.with_extension("other");
    fs::write(&other, text).unwrap();
    fs::rename(&other, path).unwrap();
}

#[tokio::test]
async fn follows_writes_and_replacements_and_survives_a_broken_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mesh.yaml");
    let store = Arc::new(Store::new());
    fs::write(&path, mesh("one")).unwrap();
    let task = watch_file(&path, Arc::clone(&store)).unwrap();
    assert_eq!(in_force(&store), "one", "loaded before it returns");

    let mut versions = store.subscribe();
    // Of the same length, so that only the times of the file tell.
    fs::write(&path, mesh("two")).unwrap();
    changed(&mut versions).await;
    assert_eq!(in_force(&store), "two");

    rename_over(&path, &mesh("six"));
    changed(&mut versions).await;
    assert_eq!(in_force(&store), "six");

    fs::write(&path, "workloads: [").unwrap();
    tokio::time::sleep(POLL_INTERVAL * 4).await;
    fs::remove_file(&path).unwrap();
    tokio::time::sleep(POLL_INTERVAL * 4).await;
    assert_eq!(in_force(&store), "six");
    assert!(!versions.has_changed().unwrap());

    fs::write(&path, mesh("ten")).unwrap();
    changed(&mut versions).await;
    assert_eq!(in_force(&store), "ten");
    task.abort();
}

#[tokio::test]
async fn follows_a_link_into_a_directory_that_is_swapped() {
    use std::os::unix::fs::symlink;
    let dir = tempfile::tempdir().unwrap();
    for name in ["one", "two"] {
        fs::create_dir(dir.path().join(name)).unwrap();
        fs::write(dir.path().join(name).join("mesh.yaml"), mesh(name)).unwrap();
    }
    symlink("one", dir.path().join("data")).unwrap();
    symlink("data/mesh.yaml", dir.path().join("mesh.yaml")).unwrap();
    let store = Arc::new(Store::new());
    let task = watch_file(dir.path().join("mesh.yaml"), Arc::clone(&store)).unwrap();
    let mut versions = store.subscribe();
    symlink("two", dir.path().join("data2")).unwrap();
    fs::rename(dir.path().join("data2"), dir.path().join("data")).unwrap();
    changed(&mut versions).await;
    assert_eq!(in_force(&store), "two");
    task.abort();
}

#[tokio::test]
async fn a_file_that_is_unusable_at_the_start_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mesh.yaml");
    let store = Arc::new(Store::new());
    let error = watch_file(&path, Arc::clone(&store)).unwrap_err();
    assert!(error.to_string().contains("No such file"), "{error}");
    fs::write(&path, "workloads: 1").unwrap();
    assert!(watch_file(&path, store).is_err());
}
