// Package bootconfig is what scripts/rootfs tells the first process of a virtual machine about the image that it is in.
package bootconfig

// File is where a layer of scripts/rootfs has a Config, as JSON. The leading slash is missing, as in tar archives.
const File = "etc/thaw-init.json"

// Config has the fields of the image's config that are about running it.
type Config struct {
	Args     []string `json:"args,omitempty"` // Entrypoint and Cmd
	Env      []string `json:"env,omitempty"`
	User     string   `json:"user,omitempty"`
	Dir      string   `json:"dir,omitempty"`  // WorkingDir
	Stop     string   `json:"stop,omitempty"` // StopSignal
	Hostname string   `json:"hostname,omitempty"`
}
