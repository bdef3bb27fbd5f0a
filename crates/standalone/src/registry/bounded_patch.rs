//! JSON patches (RFC 6902) with kube-apiserver's limits.
//!
//! A patch of two kilobytes can double an object thirty times, and one of a few hundred can nest it deeper than any stack:
//! the copies are counted before they are made.

use json_patch::{Patch, PatchOperation};
use jsonptr::Pointer;
use serde_json::Value;

use crate::error::ApiError;

/// kube-apiserver's limit for the operations of one patch.
const OPERATIONS: usize = 10_000;
/// kube-apiserver's limit for what all copies of one patch add up to; what is moved counts as well, since looking
/// at it costs as much.
const COPIED: usize = 3 << 20;
/// No kind nests as deep. JSON that is parsed ends at 128.
const DEPTH: usize = 100;
/// As much as an object may have as JSON after a patch: what a body may have.
const SIZE: usize = 3 << 20;

/// Applies the operations of `patch`, a JSON list, to `value`.
///
/// # Errors
/// When the patch is none, is too large, or does not apply. `value` may be half changed then.
pub(crate) fn apply(value: &mut Value, patch: Value) -> Result<(), ApiError> {
    let Patch(operations) = serde_json::from_value(patch)
        .map_err(|e| ApiError::bad_request(format!("error decoding patch: {e}")))?;
    if operations.len() > OPERATIONS {
        return Err(too_large(&format!(
            "the allowed maximum operations in a JSON patch is {OPERATIONS}, got {}",
            operations.len()
        )));
    }
    let mut copied = 0;
    for operation in &operations {
        check(value, operation, &mut copied)?;
        json_patch::patch(value, std::slice::from_ref(operation)).map_err(|e| {
            ApiError::new(
                422,
                "Invalid",
                format!("the server rejected our request due to an error in our request: {e}"),
            )
        })?;
    }
    Ok(())
}

/// Whether an object may be stored with what patches have added to it.
///
/// # Errors
/// 413 when it is too large or nested too deep.
pub(crate) fn check_size(value: &Value) -> Result<(), ApiError> {
    let mut budget = SIZE;
    if !measure(value, DEPTH, &mut budget) {
        return Err(too_large("the patched object is too large or nested too deep"));
    }
    Ok(())
}

fn check(value: &Value, operation: &PatchOperation, copied: &mut usize) -> Result<(), ApiError> {
    let deep = |at: &Pointer, added: &Value| {
        let steps = at.tokens().count();
        let mut budget = usize::MAX;
        steps < DEPTH && measure(added, DEPTH - steps, &mut budget)
    };
    let fits = match operation {
        PatchOperation::Add(add) => deep(&add.path, &add.value),
        PatchOperation::Replace(replace) => deep(&replace.path, &replace.value),
        PatchOperation::Copy(copy) => relocate(value, &copy.from, &copy.path, copied),
        PatchOperation::Move(moved) => relocate(value, &moved.from, &moved.path, copied),
        PatchOperation::Remove(_) | PatchOperation::Test(_) => true,
    };
    if fits {
        return Ok(());
    }
    Err(too_large(&format!(
        "a JSON patch copies more than {COPIED} bytes or nests deeper than {DEPTH}"
    )))
}

/// Whether what is at `from` may also be at `to`.
fn relocate(value: &Value, from: &Pointer, to: &Pointer, copied: &mut usize) -> bool {
    // Nothing there: the operation itself gives the error.
    let Some(found) = value.pointer(from.as_str()) else { return true };
    let steps = to.tokens().count();
    let mut budget = COPIED.saturating_sub(*copied);
    let before = budget;
    let fits = steps < DEPTH && measure(found, DEPTH - steps, &mut budget);
    *copied += before - budget;
    fits
}

/// Whether `value` is at most `depth` deep and takes at most `budget` bytes as JSON, which is what is left of it
/// afterwards. It stops at the first excess.
fn measure(value: &Value, depth: usize, budget: &mut usize) -> bool {
    let Some(deeper) = depth.checked_sub(1) else { return false };
    let own = match value {
        Value::String(text) => text.len() + 2,
        Value::Array(list) => list.len() + 2,
        Value::Object(map) => map.keys().map(|key| key.len() + 4).sum::<usize>() + 2,
        Value::Null | Value::Bool(_) | Value::Number(_) => 5,
    };
    let Some(left) = budget.checked_sub(own) else {
        *budget = 0;
        return false;
    };
    *budget = left;
    match value {
        Value::Array(list) => list.iter().all(|item| measure(item, deeper, budget)),
        Value::Object(map) => map.values().all(|item| measure(item, deeper, budget)),
        _ => true,
    }
}

fn too_large(text: &str) -> ApiError {
    ApiError::new(413, "RequestEntityTooLarge", format!("Request entity too large: {text}"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn object() -> Value {
        json!({"metadata": {"annotations": {"a": "b"}}})
    }

    fn copies(number: usize, target: impl Fn(usize) -> String) -> Value {
        let copy = |n| json!({"op": "copy", "from": "/metadata/annotations", "path": target(n)});
        (0..number).map(copy).collect()
    }

    #[test]
    fn a_patch_that_doubles_the_object_again_and_again_is_refused() {
        let bomb = copies(40, |n| format!("/metadata/annotations/k{n}"));
        assert_eq!(apply(&mut object(), bomb).unwrap_err().code, 413);
    }

    #[test]
    fn a_patch_that_nests_deeper_than_a_stack_is_refused() {
        let bomb = copies(8000, |_| "/metadata/annotations/x".to_owned());
        assert_eq!(apply(&mut object(), bomb).unwrap_err().code, 413);
    }

    #[test]
    fn moves_cannot_nest_deeper_either() {
        let mut value = json!({"a": [], "b": []});
        let step = |n: usize| match n % 2 {
            0 => json!({"op": "move", "from": "/a", "path": "/b/0"}),
            _ => json!({"op": "move", "from": "/b", "path": "/a"}),
        };
        let bomb: Value = (0..4000).map(step).collect();
        assert!(apply(&mut value, bomb).is_err());
        assert!(check_size(&value).is_ok());
    }

    #[test]
    fn too_many_operations_are_refused_and_usual_ones_are_done() {
        let test = json!({"op": "test", "path": "/metadata/annotations/a", "value": "b"});
        let many: Value = (0..=OPERATIONS).map(|_| test.clone()).collect();
        assert_eq!(apply(&mut object(), many).unwrap_err().code, 413);
        let mut value = object();
        let usual = json!([test, {"op": "add", "path": "/metadata/annotations/c", "value": "d"},
            {"op": "copy", "from": "/metadata/annotations/c", "path": "/metadata/annotations/e"}]);
        apply(&mut value, usual).unwrap();
        assert_eq!(value["metadata"]["annotations"], json!({"a": "b", "c": "d", "e": "d"}));
    }

    proptest! {
        #[test]
        fn any_list_of_operations_ends_in_a_bounded_object_or_an_error(
            steps in prop::collection::vec((0..3_u8, 0..4_usize, 0..4_usize), 0..60)
        ) {
            let places = ["/a", "/a/b", "/c", "/a/d"];
            let operation = |(kind, from, to): &(u8, usize, usize)| {
                let op = ["copy", "move", "add"][usize::from(*kind)];
                json!({"op": op, "from": places[*from], "path": places[*to], "value": {"b": {}}})
            };
            let mut value = json!({"a": {"b": {}}, "c": {}});
            if apply(&mut value, steps.iter().map(operation).collect()).is_ok() {
                prop_assert!(check_size(&value).is_ok());
            }
        }
    }
}
