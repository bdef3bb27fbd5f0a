//! placeholder
use serde_json::Value;
use crate::error::Cause;
use crate::kinds::Kind;
pub(crate) fn create(_kind: &Kind, _value: &Value) -> Vec<Cause> { Vec::new() }
pub(crate) fn update(_kind: &Kind, _old: &Value, _new: &Value) -> Vec<Cause> { Vec::new() }
