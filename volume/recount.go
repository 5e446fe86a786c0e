package volume

// Recount counts anew what this host has of the root, of which another process
// that shares the base may have fetched a part.
func (d *Device) Recount() { d.recount() }
