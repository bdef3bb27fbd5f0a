//! Takes images away: names first, and with the last name everything that they held.

use containerd_client::services::v1::DeleteImageRequest;
use tonic::Code;

use super::{ImageStore, ListedImage, Reference};
use crate::runtime::RuntimeError;

impl ImageStore {
    /// Removes an image with all of its names and returns these. When this returns, its space is free.
    pub(crate) async fn remove(&self, id: &str) -> Result<Vec<String>, RuntimeError> {
        let mut names = vec![id.to_owned()];
        names.extend(self.list().await?.into_iter().filter(|i| i.id == id).flat_map(|i| i.names));
        // The id is the last to go: whoever was interrupted finds the image again by it.
        names.rotate_left(1);
        self.remove_names(&names).await?;
        Ok(names)
    }

    /// Removes one name, and the image if no tag is left; `reference` may also be an id. Returns what was removed.
    pub(crate) async fn remove_reference(
        &self,
        reference: &str,
        image: &ListedImage,
    ) -> Result<Vec<String>, RuntimeError> {
        let name = full_name(reference)?;
        let same = self.list().await?.into_iter().filter(|other| other.id == image.id);
        let mut names = same.flat_map(|other| other.names);
        let tags_stay = names.any(|other| other != name && !other.contains('@'));
        if name == image.id || !tags_stay {
            return self.remove(&image.id).await;
        }
        self.remove_names(std::slice::from_ref(&name)).await?;
        Ok(vec![name])
    }

    /// The image that `reference` names: a name, or an id.
    pub(crate) async fn find(&self, reference: &str) -> Result<ListedImage, RuntimeError> {
        let name = full_name(reference)?;
        let named = |image: &ListedImage| image.id == name || image.names.contains(&name);
        let found = self.list().await?.into_iter().find(named);
        found.ok_or_else(|| RuntimeError::NotFound { what: "image", id: reference.to_owned() })
    }

    async fn remove_names(&self, names: &[String]) -> Result<(), RuntimeError> {
        for (position, name) in names.iter().enumerate() {
            // The last one waits for containerd to collect what nothing refers to any more.
            let sync = position + 1 == names.len();
            let delete = DeleteImageRequest { name: name.clone(), sync, ..Default::default() };
            match self.connection.images().delete(delete).await {
                Err(status) if status.code() != Code::NotFound => {
                    return Err(RuntimeError::call("remove image", name)(status));
                }
                _ => {}
            }
            if let Ok(mut configs) = self.configs.lock() {
                configs.remove(name);
            }
        }
        Ok(())
    }
}

fn full_name(reference: &str) -> Result<String, RuntimeError> {
    if reference.starts_with("sha256:") {
        return Ok(reference.to_owned());
    }
    Ok(Reference::parse(reference)?.to_string())
}
