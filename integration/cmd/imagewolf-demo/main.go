// Command imagewolf-demo shows one image going to four nodes at once.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/imagewolf/imagewolf/integration/demo"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := demo.Run(ctx, demo.Options{Image: os.Getenv("IMAGE"), JSON: os.Getenv("DEMO_JSON"), Bin: "bin", Out: os.Stdout})
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "imagewolf-demo:", err)
		os.Exit(1)
	}
}
