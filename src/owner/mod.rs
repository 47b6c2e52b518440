//! The owner's side: what the person whose data it is sees and does.

pub mod page;
pub mod report;
