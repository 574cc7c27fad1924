//! What UCX is told.

/// How UCX is used.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UcxOptions {
    /// Settings of UCX, by their names without `UCX_`, such as `("TLS", "rc,ud,self")`; they win over the environment's.
    /// `ucx_info -c` lists them.
    pub settings: Vec<(String, String)>,
}
