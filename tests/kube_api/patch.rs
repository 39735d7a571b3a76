//! The two kinds of patches.

use serde_json::{Map, Value};

/// Lists that a strategic merge patch merges by a key of their elements; all others it replaces.
const MERGED_BY: [(&str, &str); 2] = [("conditions", "type"), ("podIPs", "ip")];

/// RFC 7386.
pub fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    for (key, value) in patch {
        let target = object(target);
        if value.is_null() {
            target.shift_remove(key);
        } else {
            merge(target.entry(key).or_insert(Value::Null), value);
        }
    }
}

/// Kubernetes' own.
pub fn strategic(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    for (key, value) in patch {
        let target = object(target);
        let list_key = MERGED_BY.iter().find(|(list, _)| list == key);
        match (value, list_key) {
            (Value::Null, _) => drop(target.shift_remove(key)),
            (Value::Array(elements), Some((_, by))) => {
                let list = target.entry(key).or_insert(Value::Array(Vec::new()));
                merge_list(list, elements, by);
            }
            _ if key.starts_with("$setElementOrder/") => {}
            _ => strategic(target.entry(key).or_insert(Value::Null), value),
        }
    }
}

fn merge_list(list: &mut Value, elements: &[Value], by: &str) {
    let Value::Array(list) = list else { return };
    for element in elements {
        let place = list.iter().position(|known| known[by] == element[by]);
        match (place, element["$patch"] == "delete") {
            (Some(place), true) => drop(list.remove(place)),
            (Some(place), false) => strategic(&mut list[place], element),
            (None, true) => {}
            (None, false) => list.push(element.clone()),
        }
    }
}

fn object(value: &mut Value) -> &mut Map<String, Value> {
    if !value.is_object() {
        *value = Value::Object(Map::new());
    }
    value.as_object_mut().unwrap()
}
