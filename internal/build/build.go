// Package build tells what a program was built from.
package build

import (
	"cmp"
	"fmt"
	"runtime"
	"runtime/debug"
)

// Set by the linker (see the Makefile); a plain "go build" or "go install"
// leaves them empty and what Go recorded in the binary is shown instead.
var version, commit string

const unknown = "unknown"

// Version returns the version of the program.
func Version() string {
	recorded := ""
	if info, ok := debug.ReadBuildInfo(); ok {
		recorded = info.Main.Version
	}
	return cmp.Or(version, recorded, unknown)
}

// Describe returns lines that tell what is running: the program by its name with
// its version, the commit, Go's version and the platform.
func Describe(program string) string {
	recorded := ""
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				recorded = s.Value
			}
		}
	}
	return fmt.Sprintf("%s %s\ncommit %s\n%s %s/%s\n", program, Version(), cmp.Or(commit, recorded, unknown),
		runtime.Version(), runtime.GOOS, runtime.GOARCH)
}
