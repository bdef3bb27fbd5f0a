//! placeholder
use crate::error::Cause;
use crate::kinds::Kind;
use serde_json::Value;
pub(crate) fn create(_kind: &Kind, _value: &Value) -> Vec<Cause> {
    Vec::new()
}
pub(crate) fn update(_kind: &Kind, _old: &Value, _new: &Value) -> Vec<Cause> {
    Vec::new()
}
