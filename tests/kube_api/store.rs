//! The objects, and what happened to them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde_json::{Value, json};
use tokio::sync::watch;

use super::patch;

/// Kinds of objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Pod,
    Namespace,
    Event,
}

impl Kind {
    pub const ALL: [Self; 3] = [Self::Pod, Self::Namespace, Self::Event];

    pub fn name(self) -> &'static str {
        match self {
            Self::Pod => "Pod",
            Self::Namespace => "Namespace",
            Self::Event => "Event",
        }
    }

    pub fn plural(self) -> &'static str {
        match self {
            Self::Pod => "pods",
            Self::Namespace => "namespaces",
            Self::Event => "events",
        }
    }

    pub fn api_version(self) -> &'static str {
        match self {
            Self::Pod | Self::Namespace => "v1",
            Self::Event => "events.k8s.io/v1",
        }
    }
}

/// Kind, namespace (empty for what is in none) and name.
pub type Key = (Kind, String, String);

/// A refused request: status, reason, message.
pub type Refusal = (u16, &'static str, String);

/// One change of an object.
#[derive(Debug, Clone)]
pub struct Change {
    pub version: u64,
    pub key: Key,
    pub before: Option<Value>,
    pub after: Option<Value>,
}

#[derive(Debug, Default)]
struct State {
    version: u64,
    /// Changes up to this version are not known any more.
    forgotten: u64,
    objects: BTreeMap<Key, Value>,
    history: Vec<Change>,
    denied: BTreeSet<(String, String)>,
    requests: Vec<String>,
}

/// All objects of a cluster. They outlive a server, so that another one can go on with them.
#[derive(Debug)]
pub struct Store {
    state: Mutex<State>,
    version: watch::Sender<u64>,
}

impl Default for Store {
    fn default() -> Self {
        Self {
            state: Mutex::default(),
            version: watch::Sender::new(0),
        }
    }
}

impl Store {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells of every change.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }

    /// Refuses a verb of a resource (`patch`, `pods/status`) from here on.
    pub fn deny(&self, verb: &str, resource: &str) {
        self.lock()
            .denied
            .insert((verb.to_owned(), resource.to_owned()));
    }

    /// Refuses nothing any more.
    pub fn allow_all(&self) {
        self.lock().denied.clear();
    }

    /// Whether a request is allowed; notes it in any case.
    pub fn authorize(&self, verb: &str, resource: &str, name: &str) -> Result<(), Refusal> {
        let mut state = self.lock();
        state.requests.push(format!("{verb} {resource} {name}"));
        if state
            .denied
            .contains(&(verb.to_owned(), resource.to_owned()))
        {
            let message = format!("{resource} {name:?} is forbidden: cannot {verb}");
            return Err((403, "Forbidden", message));
        }
        Ok(())
    }

    /// Requests so far: verb, resource and name.
    pub fn requests(&self) -> Vec<String> {
        self.lock().requests.clone()
    }

    /// Forgets what happened, as a server does whose history is compacted: watches have to list again.
    pub fn forget_history(&self) {
        let mut state = self.lock();
        state.version += 1;
        state.forgotten = state.version;
        state.history.clear();
    }

    pub fn version(&self) -> u64 {
        self.lock().version
    }

    pub fn get(&self, key: &Key) -> Option<Value> {
        self.lock().objects.get(key).cloned()
    }

    /// A pod.
    pub fn pod(&self, namespace: &str, name: &str) -> Option<Value> {
        self.get(&(Kind::Pod, namespace.to_owned(), name.to_owned()))
    }

    /// All objects of a kind, in one namespace or in all, with the version that they are of.
    pub fn list(&self, kind: Kind, namespace: &str) -> (u64, Vec<Value>) {
        let state = self.lock();
        let of_kind = state.objects.iter().filter(|((of, place, _), _)| {
            *of == kind && (namespace.is_empty() || place == namespace)
        });
        let objects = of_kind.map(|(_, object)| object.clone()).collect();
        (state.version, objects)
    }

    /// Changes after a version, and the last version; none if they are not known any more.
    pub fn since(&self, version: u64) -> Option<(Vec<Change>, u64)> {
        let state = self.lock();
        if version < state.forgotten || version > state.version {
            return None;
        }
        let later = state
            .history
            .iter()
            .filter(|change| change.version > version);
        Some((later.cloned().collect(), state.version))
    }

    fn change(&self, state: &mut State, key: Key, after: Option<Value>) -> Value {
        state.version += 1;
        let version = state.version;
        let before = state.objects.remove(&key);
        let mut last = after.clone().or_else(|| before.clone()).unwrap();
        last["metadata"]["resourceVersion"] = version.to_string().into();
        if after.is_some() {
            state.objects.insert(key.clone(), last.clone());
        }
        state.history.push(Change {
            version,
            key,
            // What is deleted is sent with the version of its deletion.
            before: before.map(|before| {
                if after.is_some() {
                    before
                } else {
                    last.clone()
                }
            }),
            after: after.map(|_| last.clone()),
        });
        self.version.send_replace(version);
        last
    }

    /// Adds an object.
    pub fn create(&self, kind: Kind, mut object: Value) -> Result<Value, Refusal> {
        static UIDS: AtomicU64 = AtomicU64::new(1);
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let name = text(&object["metadata"]["name"]);
        let namespace = match kind {
            Kind::Namespace => String::new(),
            _ => text(&object["metadata"]["namespace"]),
        };
        if name.is_empty() || (kind != Kind::Namespace && namespace.is_empty()) {
            return Err((
                422,
                "Invalid",
                "metadata.name and .namespace are required".to_owned(),
            ));
        }
        object["apiVersion"] = kind.api_version().into();
        object["kind"] = kind.name().into();
        if object["metadata"]["uid"].is_null() {
            let number = UIDS.fetch_add(1, Ordering::Relaxed);
            object["metadata"]["uid"] = format!("00000000-0000-4000-8000-{number:012x}").into();
        }
        if object["metadata"]["creationTimestamp"].is_null() {
            object["metadata"]["creationTimestamp"] = "2024-01-01T00:00:00Z".into();
        }
        let key = (kind, namespace, name);
        let mut state = self.lock();
        if state.objects.contains_key(&key) {
            return Err((
                409,
                "AlreadyExists",
                format!("{} {:?} exists", kind.plural(), key.2),
            ));
        }
        Ok(self.change(&mut state, key, Some(object)))
    }

    /// Changes an object by a patch; `status` is the subresource. A patch that changes nothing makes no version.
    pub fn patch(
        &self,
        key: &Key,
        status: bool,
        strategic: bool,
        change: &Value,
    ) -> Result<Value, Refusal> {
        self.modify(key, status, change, |object| {
            if strategic {
                patch::strategic(object, change);
            } else {
                patch::merge(object, change);
            }
        })
    }

    /// Puts an object in the place of what there is.
    pub fn update(&self, key: &Key, status: bool, object: &Value) -> Result<Value, Refusal> {
        self.modify(key, status, object, |place| *place = object.clone())
    }

    fn modify(
        &self,
        key: &Key,
        status: bool,
        change: &Value,
        modify: impl FnOnce(&mut Value),
    ) -> Result<Value, Refusal> {
        let mut state = self.lock();
        let Some(before) = state.objects.get(key).cloned() else {
            return Err(not_found(key));
        };
        let uid = &change["metadata"]["uid"];
        if !uid.is_null() && *uid != before["metadata"]["uid"] {
            let message = format!(
                "the UID in the precondition ({uid}) is not that of {:?}",
                key.2
            );
            return Err((409, "Conflict", message));
        }
        let version = &change["metadata"]["resourceVersion"];
        if !version.is_null() && *version != before["metadata"]["resourceVersion"] {
            return Err((409, "Conflict", "the object has been modified".to_owned()));
        }
        let mut after = before.clone();
        modify(&mut after);
        // Either the status or the rest; labels and annotations can be changed through both.
        let kept = if status { "spec" } else { "status" };
        if key.0 == Kind::Pod {
            match before.get(kept) {
                Some(value) => after[kept] = value.clone(),
                None => drop(after.as_object_mut().unwrap().shift_remove(kept)),
            }
        }
        if after == before {
            return Ok(before);
        }
        Ok(self.change(&mut state, key.clone(), Some(after)))
    }

    /// Takes an object out at once.
    pub fn delete(&self, key: &Key) -> Result<Value, Refusal> {
        let mut state = self.lock();
        if !state.objects.contains_key(key) {
            return Err(not_found(key));
        }
        Ok(self.change(&mut state, key.clone(), None))
    }

    /// Makes a namespace.
    pub fn namespace(&self, name: &str) {
        let object = json!({"metadata": {"name": name}, "status": {"phase": "Active"}});
        self.create(Kind::Namespace, object).unwrap();
    }
}

fn not_found(key: &Key) -> Refusal {
    (
        404,
        "NotFound",
        format!("{} {:?} not found", key.0.plural(), key.2),
    )
}
