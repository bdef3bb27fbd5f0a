//! placeholder
use serde_json::Value;
use crate::error::ApiError;
use crate::kinds::Kind;
pub(crate) fn apply(_kind: &Kind, base: &Value, patch: &Value, _manager: &str, _force: bool) -> Result<Value, ApiError> {
    let mut value = base.clone();
    crate::strategic::merge(&mut value, patch)?;
    Ok(value)
}
