//! One cancellation token and a drain deadline for the whole process.
