//! Leases: what is created under one is not collected before it is deleted.

use containerd_client::services::v1::{CreateRequest, DeleteRequest, ListRequest};

use super::RuntimeError;
use super::connection::Connection;

/// A lease that nobody deletes, because we were killed, ends by itself after this time.
const LIFETIME: jiff::SignedDuration = jiff::SignedDuration::from_hours(1);

/// Makes a lease and returns its id.
pub(crate) async fn create(connection: &Connection, purpose: &str) -> Result<String, RuntimeError> {
    let id = format!("keelson-{purpose}-{}", uuid::Uuid::new_v4());
    let end = jiff::Timestamp::now() + LIFETIME;
    let labels = [("containerd.io/gc.expire".to_owned(), format!("{end:.0}"))].into();
    let request = CreateRequest { id: id.clone(), labels };
    connection
        .leases()
        .create(request)
        .await
        .map_err(RuntimeError::call("create lease for", purpose))?;
    Ok(id)
}

/// Ends a lease. One that stays expires.
pub(crate) async fn delete(connection: &Connection, id: &str) {
    drop(connection.leases().delete(DeleteRequest { id: id.to_owned(), sync: false }).await);
}

/// Ends the leases of container creations that an earlier agent did not finish; what they held is collected.
///
/// # Errors
/// When containerd does not answer.
pub(crate) async fn delete_unfinished(connection: &Connection) -> Result<(), RuntimeError> {
    let reply = connection.leases().list(ListRequest::default()).await;
    let leases = reply.map_err(RuntimeError::call("list", "leases"))?.into_inner().leases;
    for lease in leases.iter().filter(|lease| lease.id.starts_with("keelson-container-")) {
        // Waits for the collection: afterwards there is nothing of the unfinished ones.
        drop(connection.leases().delete(DeleteRequest { id: lease.id.clone(), sync: true }).await);
    }
    Ok(())
}
