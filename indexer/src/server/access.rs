//! Who may ask for what, by the address that a call came to: at a tenant's own address nothing of others can be had.

use kvcache_core::{Error, ErrorKind, Result};

use super::hub::{Hub, Pod};
use crate::wire::Registration;

/// What an address is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// Whoever reaches it may name any tenant.
    Any,
    /// It is this tenant's.
    Tenant(usize),
}

impl Access {
    /// Whether something of a tenant may be seen here.
    pub(super) fn allows(self, tenant: usize) -> bool {
        self == Self::Any || self == Self::Tenant(tenant)
    }
}

impl Hub {
    /// The tenant that a call is about which names one, or none.
    ///
    /// # Errors
    /// [`ErrorKind::Denied`] naming both when the call came to another tenant's address.
    pub(super) fn named_tenant(&self, access: Access, named: String) -> Result<String> {
        let Access::Tenant(own) = access else {
            return Ok(named);
        };
        let own = &self.tenants.all()[own].name;
        if named.is_empty() || named == *own {
            return Ok(own.clone());
        }
        Err(denied(own, &format!("tenant {named:?}")))
    }

    /// Whether a pod's entries may be seen by a caller.
    pub(super) fn may_see(&self, access: Access, pod: &Pod) -> bool {
        access == Access::Any || access.allows(self.tenant_of(&pod.registration))
    }

    pub(super) fn tenant_of(&self, registration: &Registration) -> usize {
        let Registration { pod, model, .. } = registration;
        self.tenants.of_pod(pod, model)
    }

    /// # Errors
    /// [`ErrorKind::Denied`] naming both tenants when the pod, or the one whose place it would take, is another's.
    pub(super) fn may_register(&self, access: Access, registration: &Registration) -> Result<()> {
        let Access::Tenant(own) = access else {
            return Ok(());
        };
        let known = self.pods().get(&registration.pod).cloned();
        let known = known.map(|pod| self.tenant_of(&pod.registration));
        let tenants = std::iter::once(self.tenant_of(registration)).chain(known);
        match tenants.into_iter().find(|tenant| *tenant != own) {
            Some(other) => {
                let (own, other) = (self.tenant_name(own), self.tenant_name(other));
                let what = format!("pod {} of tenant {other:?}", registration.pod);
                Err(denied(own, &what))
            }
            None => Ok(()),
        }
    }

    /// # Errors
    /// [`ErrorKind::Denied`] naming what is of all tenants, at the address of one.
    pub(super) fn may_see_all(&self, access: Access, what: &str) -> Result<()> {
        match access {
            Access::Any => Ok(()),
            Access::Tenant(own) => Err(denied(self.tenant_name(own), what)),
        }
    }

    fn tenant_name(&self, tenant: usize) -> &str {
        &self.tenants.all()[tenant].name
    }
}

fn denied(own: &str, what: &str) -> Error {
    let context = format!("{what} cannot be had here: this address is for tenant {own:?} only");
    Error::new(ErrorKind::Denied, context)
}
