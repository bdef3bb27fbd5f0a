//! placeholder
use crate::error::ApiError;
use crate::kinds::Kind;
use serde_json::Value;
pub(crate) fn apply(
    _kind: &Kind,
    base: &Value,
    patch: &Value,
    _manager: &str,
    _force: bool,
) -> Result<Value, ApiError> {
    let mut value = base.clone();
    crate::strategic::merge(&mut value, patch)?;
    Ok(value)
}
